"""A coordinator that says what it is told, over a real socket, and the unmodified client that hears it."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError
from fedloom.core.schema import Role, Schema, Tensors
from fedloom.proto.messages import Assignment, broadcast_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc

ALL = frozenset({Role.LORA_A, Role.LORA_B, Role.HEAD})


@dataclass
class Liar(rpc.FederationServicer):
    """Tells a client of a run and gives it one round's work until that is done; then the run is over.

    Args:
        spec: The run as JSON, whatever stands in it.
        schema: The run's schema as JSON.
        work: The round's assignment.
        payload: Its broadcast.
    """

    spec: str
    schema: str
    work: pb.Assignment | None = None
    payload: bytes = b""
    heard: list[str] = field(default_factory=list)
    """The calls that came, in order."""
    updates: list[bytes] = field(default_factory=list)

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        self.heard.append("join")
        digest = hashlib.sha256(self.schema.encode()).hexdigest()
        return pb.JoinReply(run="lie", epoch=1, spec=self.spec, schema=self.schema, schema_digest=digest)

    def Work(self, request: pb.WorkRequest, context: Any) -> pb.WorkReply:
        self.heard.append("work")
        if self.work is not None:
            return pb.WorkReply(assignment=self.work)
        return pb.WorkReply(finished=pb.Finished(rounds=1, codec="fp32", digest="0" * 64, bytes=0))

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Chunk]:
        self.heard.append("fetch")
        yield pb.Chunk(data=self.payload)

    def Submit(self, request_iterator: Iterator[pb.SubmitRequest], context: Any) -> pb.SubmitReply:
        self.heard.append("submit")
        self.updates.append(b"".join(each.data for each in request_iterator))
        self.work = None
        return pb.SubmitReply()

    def Exchange(self, request: pb.ExchangeRequest, context: Any) -> pb.ExchangeReply:
        return pb.ExchangeReply(waiting=True)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        return pb.HeartbeatReply()

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveReply:
        self.heard.append(f"leave: {request.reason}")
        return pb.LeaveReply()


@contextmanager
def served(liar: Liar) -> Iterator[str]:
    """The address at which the liar answers."""
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_FederationServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def broadcast(schema: Schema, tensors: Tensors, **fields: Any) -> tuple[pb.Assignment, bytes]:
    """An assignment of all roles, with the broadcast it announces."""
    order = _order(fields)
    payload = codec("fp32").encode(broadcast_schema(schema, order), tensors)
    digest = hashlib.sha256(payload).hexdigest()
    return _message(order, digest, len(payload)), payload


def announcement(size_bytes: int, **fields: Any) -> pb.Assignment:
    """An assignment whose broadcast nobody has."""
    order = _order(fields)
    return _message(order, "ab" * 32, size_bytes)


def _order(fields: dict[str, Any]) -> Assignment:
    values: dict[str, Any] = {"round": 0, "train": ALL, "broadcast_roles": ALL}
    return Assignment(**values | {"broadcast_digest": "", "broadcast_bytes": 0} | fields)


def _message(order: Assignment, digest: str, size_bytes: int) -> pb.Assignment:
    return pb.Assignment(
        round=order.round,
        train=sorted(order.train),
        rank=order.rank or 0,
        base_rank=order.base_rank,
        local=dict(order.local),
        broadcast_roles=sorted(order.broadcast_roles),
        broadcast_codec=order.broadcast_codec,
        broadcast_digest=digest,
        broadcast_bytes=size_bytes,
        upload_codec=order.upload_codec,
        linear=sorted(order.linear),
    )


def edited(spec: Spec, **sections: dict[str, Any]) -> str:
    """The spec as JSON with other values in it, which no check has seen."""
    tables = json.loads(spec.model_dump_json())
    for name, values in sections.items():
        tables[name] |= values
    return json.dumps(tables)


@dataclass
class Site:
    """A site with data, a model and a ledger."""

    model: AdapterModel
    rows: Rows
    policy: Policy
    ledger: Ledger

    def hears(self, liar: Liar) -> FedloomError | None:
        """Take part until the run is over or the client ends; what it ended with."""
        with served(liar) as address:
            line = GrpcConnection(address)
            client = Participant(
                line, self.policy, lambda joined: Trainer(self.model, self.rows, joined.spec, self.policy, self.ledger)
            )
            try:
                client.run(patience_s=5.0)
            except FedloomError as error:
                return error
            finally:
                line.close()
        return None
