"""How many clients one coordinator holds: memory, and how long a heartbeat takes while rounds go on beside it."""

import asyncio
import functools
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from fedloom.client.transport.tls import member_pair
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, FedloomError
from fedloom.core.limits import LONG_POLL_S
from fedloom.core.runtime.memory import keep_freed_memory, peak_bytes
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.security.certificates import read_ca
from fedloom.proto.frames import DATA_FIELD, SERVICE, frames
from fedloom.proto.messages import PROTOCOL_VERSION, Assignment, Finished, Joined, UpdateHeader, upload_schema
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.v1 import federation_pb2_grpc as rpc
from fedloom.proto.wire import answer_from_wire, from_wire, header_to_wire
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serve
from fedloom.server.storage.local import Store
from fedloom.simulation.credentials import certificates
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_clients", "coordinate"]

_COHORT = 16
_CALL_S = 30.0
_ARRIVING = 64
_SPARE_FILES = 200
_SERVE = "import sys; from fedloom.simulation.benchmarks.clients import coordinate; coordinate(*sys.argv[1:])"


@dataclass
class _Tally:
    """What the clients have seen."""

    measuring: bool = False
    ending: bool = False
    beats_ms: list[float] = field(default_factory=list)
    updates: int = 0
    errors: list[str] = field(default_factory=list)


def coordinate(folder: str, expected: str, certs: str = "") -> None:
    """The coordinator's process: prints its address, then serves rounds of a small cohort until it is told to stop."""
    keep_freed_memory()  # as `fedloom server` does
    clients = int(expected)
    config = RunConfig.model_validate(
        {
            "run": {"name": "bench-clients", "rounds": 100_000},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": min(clients, _COHORT), "clients_per_round": min(clients, _COHORT)},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    schema = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 1024)), TensorSpec("m.B", "m", Role.LORA_B, (1024, 8))))
    _allow_files(clients)
    with Store(Path(folder) / "state") as store:
        starting = starting_adapter(schema, 0)
        coordinator = Coordinator(config, schema, FedAvg(), store, starting=starting, expect=clients)
        ready = functools.partial(print, flush=True)
        asyncio.run(serve(coordinator, "127.0.0.1:0", ready=ready, certs=Path(certs) if certs else None))


def bench_clients(*, clients: int, seconds: float, heartbeat_s: float, training_s: float, tls: bool) -> dict[str, Any]:
    """Hold `clients` clients, each with a connection, a waiting poll and a heartbeat of its own, for `seconds`.

    Meanwhile rounds of 16 clients go on, which take `training_s` to answer; each round that opens wakes every poll.
    The coordinator is a process of its own and syncs to disk; all clients live in this one. With `tls` each of them has
    a certificate of its own, and every call is checked against the authority's list.

    Returns:
        rss_mib: the coordinator's peak. heartbeat_p50_ms and heartbeat_p99_ms as the clients see them. errors: calls
        that failed. Then what was done: heartbeats, rounds, updates, seconds until all clients had arrived, and the
        coordinator's CPU seconds for each second.
    """
    _allow_files(clients)
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
        names = [f"client-{number}" for number in range(clients)]
        certs = certificates(Path(folder), names) if tls else {}
        command = [sys.executable, "-c", _SERVE, folder, str(clients), *([f"{folder}/authority"] if tls else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None  # it was opened as a pipe
            try:
                address = process.stdout.readline().strip()
                if not address:
                    raise FedloomError("the benchmark's coordinator failed; its own error is above")
                channels = {name: _channel(address, certs.get(name)) for name in names}
                figures = asyncio.run(_hold(channels, process.pid, seconds, heartbeat_s, training_s))
            finally:
                process.send_signal(signal.SIGTERM)
    return {**figures, "clients": clients, "seconds": seconds, "heartbeat_s": heartbeat_s, "tls": tls}


def _channel(address: str, certs: Path | None) -> Callable[[], aio.Channel]:
    """Opens a connection in the running loop."""
    # Channels to one address would share a connection.
    own: list[tuple[str, int]] = [("grpc.use_local_subchannel_pool", 1)]
    if certs is None:
        return lambda: aio.insecure_channel(address, options=own)
    pair = member_pair(certs)
    roots = read_ca(certs).public_bytes(Encoding.PEM)
    credentials = grpc.ssl_channel_credentials(roots, pair.key_pem, pair.certificate_pem)
    return lambda: aio.secure_channel(address, credentials, options=own)


async def _hold(
    opening: Mapping[str, Callable[[], aio.Channel]], pid: int, seconds: float, heartbeat_s: float, training_s: float
) -> dict[str, Any]:
    tally, began_s, clients = _Tally(), time.monotonic(), len(opening)
    channels = [opened() for opened in opening.values()]
    sites = [_Site(channel, name, tally) for channel, name in zip(channels, opening, strict=True)]
    gate = asyncio.Semaphore(_ARRIVING)

    async def arrive(site: "_Site") -> None:
        async with gate:
            await site.join()

    await asyncio.gather(*(arrive(site) for site in sites))
    arrived_s = time.monotonic() - began_s
    lives = [asyncio.create_task(site.live(training_s)) for site in sites]
    lives += [asyncio.create_task(site.beat(heartbeat_s)) for site in sites]
    await asyncio.sleep(min(heartbeat_s, 5.0))
    tally.measuring, before_s, updates = True, _cpu_s(pid), tally.updates
    await asyncio.sleep(seconds)
    tally.measuring, tally.ending, cpu_s = False, True, _cpu_s(pid) - before_s
    updates = tally.updates - updates
    for life in lives:
        life.cancel()
    ended = await asyncio.gather(*lives, return_exceptions=True)
    tally.errors += [repr(each) for each in ended if isinstance(each, Exception)]
    peak_mib = peak_bytes(pid) / 2**20
    for start in range(0, clients, _ARRIVING):
        await asyncio.gather(*(channel.close(None) for channel in channels[start : start + _ARRIVING]))
    return {
        "rss_mib": peak_mib,
        "heartbeat_p50_ms": float(np.percentile(tally.beats_ms, 50)),
        "heartbeat_p99_ms": float(np.percentile(tally.beats_ms, 99)),
        "errors": len(tally.errors),
        "first_error": tally.errors[0] if tally.errors else "",
        "heartbeats": len(tally.beats_ms),
        "updates": updates,
        "rounds": updates // min(clients, _COHORT),
        "arrived_s": arrived_s,
        "cpu_share": cpu_s / seconds,
    }


class _Site:
    """A client without a model, on a connection of its own."""

    def __init__(self, channel: aio.Channel, name: str, tally: _Tally) -> None:
        self.name, self.tally = name, tally
        self.stub: rpc.FederationAsyncStub = rpc.FederationStub(channel)
        self.submit = channel.stream_unary(
            f"/{SERVICE}/Submit", request_serializer=None, response_deserializer=pb.SubmitReply.FromString
        )

    async def join(self) -> None:
        """Learn about the run."""
        request = pb.JoinRequest(client=self.name, protocol=PROTOCOL_VERSION)
        joined = from_wire(Joined, await self.stub.Join(request, timeout=_CALL_S))
        self.run, self.epoch, self.schema = joined.run, joined.epoch, joined.schema

    async def live(self, training_s: float) -> None:
        """Ask for work and do it, again and again."""
        request = pb.WorkRequest(run=self.run, epoch=self.epoch, client=self.name)
        while True:
            try:
                answer = answer_from_wire(await self.stub.Work(request, timeout=LONG_POLL_S + _CALL_S))
                if isinstance(answer, Finished):
                    return
                if isinstance(answer, Assignment):
                    await self.answer(answer, training_s)
            except grpc.RpcError as error:
                if self.tally.ending:  # a call that is cancelled ends like this, and the task is not to outlive it
                    return
                self.tally.errors.append(repr(error))
                await asyncio.sleep(1.0)

    async def answer(self, assignment: Assignment, training_s: float) -> None:
        """Fetch the broadcast, wait as if training, and send zeros."""
        request = pb.FetchRequest(run=self.run, epoch=self.epoch, client=self.name, digest=assignment.broadcast_digest)
        async for _ in self.stub.Fetch(request, timeout=_CALL_S):
            pass
        await asyncio.sleep(random.uniform(0.5, 1.0) * training_s)
        upload = upload_schema(self.schema, assignment)
        body = bytes(4 * upload.size)
        digest = hashlib.sha256(body).hexdigest()
        header = UpdateHeader(self.name, assignment.round, upload.digest, "fp32", len(body), digest)

        async def messages() -> AsyncIterator[bytes]:
            yield pb.SubmitRequest(header=header_to_wire(header, self.run, self.epoch)).SerializeToString()
            for frame in frames(DATA_FIELD, body):
                yield frame

        await self.submit(messages(), timeout=_CALL_S)
        self.tally.updates += 1

    async def beat(self, every_s: float) -> None:
        """A heartbeat every so often, at a time of its own."""
        request = pb.HeartbeatRequest(run=self.run, epoch=self.epoch, client=self.name)
        await asyncio.sleep(random.uniform(0, every_s))
        while True:
            began_s = time.perf_counter()
            try:
                await self.stub.Heartbeat(request, timeout=_CALL_S)
                if self.tally.measuring:
                    self.tally.beats_ms.append(1e3 * (time.perf_counter() - began_s))
            except grpc.RpcError as error:
                if self.tally.ending:
                    return
                self.tally.errors.append(repr(error))
            await asyncio.sleep(every_s)


def _allow_files(clients: int) -> None:
    """Let this process open a socket for each client."""
    needed = clients + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed <= hard or (soft < needed and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    elif soft < needed:
        raise ConfigError(f"{clients} clients need {needed} open files, {hard} are allowed; raise `ulimit -n`")


def _cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
