"""A coordinator in a process of its own, with clients that are told what to send: what the fault tests put faults into.

Run as a script with a state directory, it serves until the run is over.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.limits import CHUNK_BYTES
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, Finished, UpdateHeader, Wait, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1.federation_pb2_grpc import FederationStub
from fedloom.proto.wire import answer_from_wire, header_to_wire
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import Event
from fedloom.server.rpc.server import serve
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_to_bytes

__all__ = [
    "CONFIG",
    "NAMES",
    "SCHEMA",
    "Acknowledged",
    "Client",
    "coordinator_process",
    "finish",
    "open_coordinator",
    "schema_of",
    "served",
    "update",
]


def schema_of(width: int) -> Schema:
    """One pair of rank 2 and 4 * width values."""
    return Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, width)), TensorSpec("m.B", "m", Role.LORA_B, (width, 2))))


SCHEMA = schema_of(16)
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "faults", "rounds": 2},
        "model": {"base": "none", "labels": ["a", "b"], "head": "frozen"},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
        "rounds": {"min_clients": 2},
        "wire": {"upload": "fp32", "broadcast": "fp32"},
    }
)
NAMES = ("ann", "ben")
_CALL_S = 60.0
_OWN = [("grpc.use_local_subchannel_pool", 1)]
"""A connection of its own for each channel, as for clients on machines of their own."""

Acknowledged = list[tuple[UpdateHeader, bytes]]
"""Updates that the coordinator has said it has."""


def open_coordinator(store: Store, config: RunConfig = CONFIG, schema: Schema = SCHEMA, expect: int = 0) -> Coordinator:
    """A run on this state."""
    return Coordinator(config, schema, FedAvg(), store, starting=starting_adapter(schema, 0), expect=expect)


def update(
    name: str, assignment: Assignment, scale: float = 1.0, schema: Schema = SCHEMA
) -> tuple[UpdateHeader, bytes]:
    """What a client sends: a function of its name and the round."""
    derived = upload_schema(schema, assignment)
    rng = np.random.default_rng([*name.encode(), assignment.round])
    delta = {s.name: (scale * rng.normal(size=s.shape)).astype(np.float32) for s in derived.tensors}
    payload = codec("fp32").encode(derived, delta)
    digest = hashlib.sha256(payload).hexdigest()
    return UpdateHeader(name, assignment.round, derived.digest, "fp32", len(payload), digest), payload


def finish(state: Path, acknowledged: Acknowledged = []) -> str:  # noqa: B006  # only read
    """Start again on a sound disk, check that every acknowledged update is known, and run to the end."""
    with Store(state) as store:
        coordinator = open_coordinator(store)
        places = {}
        for name in NAMES:
            joined = coordinator.join(name, 1, 0)
            places[name] = joined.run, joined.epoch
        for header, payload in acknowledged:
            assert coordinator.submit(header, payload, *places[header.client]) is True, "an acknowledged update is gone"
        while not coordinator.finished:
            for name in NAMES:
                answer = coordinator.work(name, *places[name])
                if isinstance(answer, Assignment):
                    coordinator.submit(*update(name, answer), *places[name])
        return hashlib.sha256(state_to_bytes(coordinator.state)).hexdigest()


class Client:
    """One client without a model, on a channel of its own."""

    def __init__(self, address: str, name: str, pid: int = 0) -> None:
        self.address, self.name, self.pid = address, name, pid
        self.channel = grpc.insecure_channel(address, options=_OWN)
        self.stub = FederationStub(self.channel)
        self.run, self.epoch = "", 0

    def join(self, examples: int = 0) -> None:
        request = pb.JoinRequest(client=self.name, protocol=1, declared_examples=examples)
        joined = self.stub.Join(request, timeout=_CALL_S)
        self.run, self.epoch = joined.run, joined.epoch

    def ask(self) -> "grpc.CallFuture[pb.WorkReply]":
        """Ask for work without waiting for the answer."""
        return self.stub.Work.future(pb.WorkRequest(run=self.run, epoch=self.epoch, client=self.name), timeout=_CALL_S)

    def answer(self, asked: "grpc.CallFuture[pb.WorkReply]") -> Assignment | Wait | Finished:
        return answer_from_wire(asked.result())

    def work(self, held: str = "") -> Assignment | Wait | Finished:
        return self.answer(self.ask())

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Whether it was there before. On a connection of its own, so that a trace shows what the reply is."""
        first = pb.SubmitRequest(header=header_to_wire(header, self.run, self.epoch))
        chunks = [payload[start : start + CHUNK_BYTES] for start in range(0, len(payload), CHUNK_BYTES)]
        messages = iter([first, *(pb.SubmitRequest(data=chunk) for chunk in chunks)])
        with grpc.insecure_channel(self.address, options=_OWN) as channel:
            return FederationStub(channel).Submit(messages, timeout=_CALL_S).duplicate

    def beat(self) -> None:
        self.stub.Heartbeat(pb.HeartbeatRequest(run=self.run, epoch=self.epoch, client=self.name), timeout=_CALL_S)

    def leave(self) -> None:
        self.stub.Leave(pb.LeaveRequest(run=self.run, epoch=self.epoch, client=self.name), timeout=_CALL_S)

    def peak_mib(self) -> float:
        """Most memory that the coordinator's process has held."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def final(self) -> bytes:
        answer = self.work()
        assert isinstance(answer, Finished)
        request = pb.FetchRequest(run=self.run, epoch=self.epoch, client=self.name, digest=answer.digest)
        return b"".join(chunk.data for chunk in self.stub.Fetch(request, timeout=_CALL_S))


@contextmanager
def coordinator_process(
    state: Path, *, prefix: Sequence[str] = (), **options: object
) -> "Iterator[subprocess.Popen[str]]":
    """This file as a process; the first line it prints is its address. It is gone at the end of the block.

    Args:
        state: Its state directory.
        prefix: Command that runs it, such as strace.
        options: durable, expect, width, one_thread, slow_disk_s and config, see the end of this file.
    """
    command = [*prefix, sys.executable, __file__, str(state), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def served(state: Path, *names: str, **options: object) -> Iterator[list[Client]]:
    """Clients of a coordinator process on this state; it does not synchronise its disk unless it is told to."""
    with coordinator_process(state, prefix=(), **{"durable": False, **options}) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        clients = [Client(address, name, process.pid) for name in names]
        try:
            yield clients
        finally:
            for client in clients:
                client.channel.close()


def _at_once(_: ThreadPoolExecutor, call: Callable[..., object], /, *args: object, **kwargs: object) -> Future[object]:
    """Instead of `ThreadPoolExecutor.submit`: strace counts calls by thread, so a numbered fault needs a single one."""
    done: Future[object] = Future()
    try:
        done.set_result(call(*args, **kwargs))
    except Exception as error:
        done.set_exception(error)
    return done


class _SlowStore(Store):
    """A store on a disk that takes its time."""

    slow_disk_s = 0.0

    def append(self, *events: Event) -> None:
        time.sleep(self.slow_disk_s)
        super().append(*events)


def _main(state: Path, options: dict[str, Any]) -> None:
    if options.get("one_thread"):
        ThreadPoolExecutor.submit = _at_once  # type: ignore[assignment,method-assign]  # see there
    config = RunConfig.model_validate({**CONFIG.model_dump(mode="json"), **options.get("config", {})})
    _SlowStore.slow_disk_s = options.get("slow_disk_s", 0.0)
    with _SlowStore(state, durable=options.get("durable", True)) as store:
        made = open_coordinator(store, config, schema_of(options.get("width", 16)), options.get("expect", 0))
        asyncio.run(serve(made, "127.0.0.1:0", ready=lambda address: print(address, flush=True), linger_s=2.0))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), json.loads(sys.argv[2]))
