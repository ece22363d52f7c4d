"""Clients that send too much, too slowly or not at all, against a real server: the others do not notice."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session import participant as participant_module
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import Overloaded
from fedloom.core.limits import CHUNK_BYTES
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, Joined, UpdateHeader, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1.federation_pb2_grpc import FederationStub
from fedloom.proto.wire import RETRY_AFTER, header_to_wire
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc import server as serve_module
from fedloom.server.rpc import servicer as servicer_module
from fedloom.server.rpc import streams as transfer
from fedloom.server.rpc.load_shedding import CLIENT_CALLS, Lane
from fedloom.server.rpc.server import serving
from fedloom.server.rpc.uploads import Uploads
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from tests.support.trainers import Steady

TIMEOUT_S = 60.0


def square(width: int) -> Schema:
    return Schema(
        (TensorSpec("m.A", "m", Role.LORA_A, (8, width)), TensorSpec("m.B", "m", Role.LORA_B, (width, 8))),
    )


SCHEMA = square(20_000)


def coordinator(store: Store, clients: int, schema: Schema = SCHEMA) -> Coordinator:
    run = RunConfig.model_validate(
        {
            "run": {"name": "abuse", "rounds": 1},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": clients, "lease_s": 120.0},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    return Coordinator(run, schema, FedAvg(), store, starting=starting_adapter(schema, 0))


@dataclass
class Site:
    """A client of which a test plays every part."""

    address: str
    name: str
    coordinator: Coordinator
    options: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        joined = self.coordinator.join(self.name, 1, 0)
        self.to = joined.run, joined.epoch
        self.coordinator.work(self.name, *self.to)
        # Channels to one address share a connection unless they are told not to.
        self.channel = grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1), *self.options])
        self.stub = FederationStub(self.channel)

    @cached_property
    def update(self) -> tuple[pb.UpdateHeader, bytes]:
        """What it answers to its first assignment."""
        order = self.coordinator.work(self.name, *self.to)
        assert isinstance(order, Assignment)
        schema = upload_schema(SCHEMA, order)
        body = np.ones(schema.size, np.float32).tobytes()
        digest = hashlib.sha256(body).hexdigest()
        header = UpdateHeader(self.name, 0, schema.digest, "fp32", len(body), digest)
        return header_to_wire(header, *self.to), body

    def submit(self, parts: Iterator[pb.SubmitRequest], **options: Any) -> Any:
        return self.stub.Submit.future(parts, timeout=TIMEOUT_S, **options)

    def send(self) -> bool:
        header, body = self.update

        def parts() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=header)
            for start in range(0, len(body), CHUNK_BYTES):
                yield pb.SubmitRequest(data=body[start : start + CHUNK_BYTES])

        return bool(self.submit(parts()).result().duplicate)


@contextmanager
def federation(folder: Path, *names: str, schema: Schema = SCHEMA) -> Iterator[list[Site]]:
    with Store(folder, durable=False) as store:
        made = coordinator(store, len(names), schema)
        with serving(made, linger_s=0.0) as address, ExitStack() as stack:
            sites = [Site(address, name, made) for name in names]
            for site in sites:
                stack.callback(site.channel.close)
            yield sites


def status(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details() or "", dict(error.trailing_metadata() or ())


def test_a_thousand_silent_sockets_and_two_hundred_stalled_uploads_stop_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRANSFER_GRACE_S", 2.0)
    brief = [(key, 1_000 if "handshake" in key else value) for key, value in serve_module.OPTIONS]
    monkeypatch.setattr(serve_module, "OPTIONS", tuple(brief))
    stalled = [f"stalled-{number}" for number in range(200)]
    over = threading.Event()

    def stall(site: Site) -> Any:
        header, body = site.update

        def parts() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=header)
            yield pb.SubmitRequest(data=body[:CHUNK_BYTES])
            over.wait(TIMEOUT_S)

        return site.submit(parts())

    with federation(tmp_path, "ann", "ben", *stalled) as (ann, ben, *others), ExitStack() as stack:
        host, _, port = ann.address.rpartition(":")
        silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(1000)]
        calls = [stall(site) for site in others]

        assert [ann.send(), ben.send()] == [False, False]
        assert ann.coordinator.progress.submitted == ("ann", "ben")
        ends = [status(call.result) for call in calls]
        over.set()

        assert {(code, "too slow" in text) for code, text, _ in ends} == {(grpc.StatusCode.UNAVAILABLE, True)}
        assert ann.send() is True
        for each in silent:
            each.settimeout(TIMEOUT_S)
            while each.recv(1 << 16):  # the server's greeting, then the end
                pass


def test_a_bomb_is_refused_by_the_size_it_unfolds_to(tmp_path: Path) -> None:
    with federation(tmp_path, "ann", "ben") as (ann, ben):
        header, _ = ann.update
        parts = [pb.SubmitRequest(header=header), pb.SubmitRequest(data=bytes(64 << 20))]

        bomb = ann.submit(iter(parts), compression=grpc.Compression.Gzip)

        assert status(bomb.result)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [ann.send(), ben.send()] == [False, False]


def test_a_client_that_does_not_read_its_download_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TRANSFER_GRACE_S", 1.0)
    with federation(tmp_path, "ann", schema=square(1_000_000)) as (ann,):
        order = ann.coordinator.work("ann", *ann.to)
        assert isinstance(order, Assignment)
        request = pb.FetchRequest(run=ann.to[0], epoch=ann.to[1], client="ann", digest=order.broadcast_digest)
        got = 0

        def read() -> None:
            nonlocal got
            chunks = ann.stub.Fetch(request, timeout=TIMEOUT_S)
            for chunk in chunks:
                if not got:
                    threading.Event().wait(3.0)
                got += len(chunk.data)

        code, text, _ = status(read)

        assert (code, "too slow" in text) == (grpc.StatusCode.UNAVAILABLE, True)
        assert 0 < got < order.broadcast_bytes


def test_one_client_cannot_hold_every_call(tmp_path: Path) -> None:
    with federation(tmp_path, "ann", "ben") as (ann, ben):
        ann.send()  # now her polls wait for Ben
        request = pb.WorkRequest(run=ann.to[0], epoch=ann.to[1], client="ann")
        lines = [Site(ann.address, "ann", ann.coordinator) for _ in range(2)]
        polls = [lines[number % 2].stub.Work.future(request, timeout=TIMEOUT_S) for number in range(CLIENT_CALLS)]
        beat = pb.HeartbeatRequest(run=ann.to[0], epoch=ann.to[1], client="ann")

        def refusal() -> None:
            while True:  # until all her polls have arrived
                ann.stub.Heartbeat(beat, timeout=TIMEOUT_S)

        code, text, trailer = status(refusal)

        assert (code, trailer[RETRY_AFTER]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1000")
        assert "under way" in text
        assert ben.send() is False
        assert {poll.result().WhichOneof("answer") for poll in polls} == {"finished"}
        for line in lines:
            line.channel.close()


def test_who_is_too_many_comes_back_when_told_and_sends_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd, told, slept, uploaded = 12, [], [], []  # type: tuple[int, list[float], list[float], list[int]]
    monkeypatch.setattr(servicer_module, "_THREADS", 1)
    monkeypatch.setattr(servicer_module, "_WAITING", {"call": 1000, "update": 1})
    come_back, add, submit = Lane._come_back, Uploads.add, Coordinator.submit

    def noted(lane: Lane, now_s: float) -> float:
        told.append(come_back(lane, now_s))
        return told[-1]

    def counted(uploads: Uploads, upload: Any, turn: int, data: memoryview) -> None:
        uploaded.append(len(data))
        add(uploads, upload, turn, data)

    def slow(made: Coordinator, *arguments: Any) -> bool:
        threading.Event().wait(0.05)
        return submit(made, *arguments)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        threading.Event().wait(seconds)

    monkeypatch.setattr(Lane, "_come_back", noted)
    monkeypatch.setattr(Uploads, "add", counted)
    monkeypatch.setattr(Coordinator, "submit", slow)
    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(participant_module, "time", clock)
    with Store(tmp_path, durable=False) as store:
        made = coordinator(store, crowd)
        with serving(made) as address:
            threads = [threading.Thread(target=take_part, args=(address, f"c{n}"), daemon=True) for n in range(crowd)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT_S)

    assert made.finished
    assert len(told) > 0
    assert {round(each, 3) for each in told} <= {round(each, 3) for each in slept}
    assert sum(uploaded) == crowd * 4 * SCHEMA.size


def take_part(address: str, name: str) -> None:
    policy = Policy.model_validate(
        {"client": {"name": name}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )

    def prepare(_: Joined) -> Steady:
        return Steady(SCHEMA)

    line = GrpcConnection(address)
    Participant(line, policy, prepare).run(patience_s=TIMEOUT_S)
    line.close()


def test_a_busy_coordinator_does_not_run_out_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, if only to say when to come back: patience is for one that does not."""

    class Busy:
        refusals = 5

        def join(self, client: str, declared_examples: int) -> Joined:
            self.refusals -= 1
            if self.refusals:
                raise Overloaded("busy", 0.001)
            raise KeyboardInterrupt

        def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
            pass

    policy = Policy.model_validate({"client": {"name": "ann"}, "data": {"source": "none"}})
    busy: Any = Busy()
    with pytest.raises(KeyboardInterrupt):
        Participant(busy, policy, lambda _: Steady(SCHEMA)).run(patience_s=-1.0)
