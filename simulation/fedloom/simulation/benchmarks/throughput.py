"""How fast payloads go both ways, over TLS on the loopback interface and through a proxy that is slow and far away."""

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import FedloomError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, UpdateHeader, upload_schema
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.simulation.benchmarks.raw_grpc import RawExchange, raw_server
from fedloom.simulation.benchmarks.round import roberta_large_schema
from fedloom.simulation.credentials import certificates
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_throughput", "delayed", "transfer"]

_MIB = 1 << 20
_NAME = "client-0"


def bench_throughput(*, mib: int, rounds: int, rtt_ms: float, mbit_s: float) -> dict[str, Any]:
    """Time what one client fetches and sends in a round.

    Args:
        mib: Size of the float32 adapter that goes each way over TLS.
        rounds: Rounds to measure, after one to warm up.
        rtt_ms: Round trip through the proxy, for FedSVD at two bits on RoBERTa-large's adapter.
        mbit_s: What the proxy lets through each way.

    Returns:
        down_mib_s and up_mib_s, medians over the rounds, from the call to the checked digest and to the accepted
        update; down_of_raw and up_of_raw, medians of these over what streams of bare gRPC move of the same bytes over
        the same TLS right after; far_s, the median of what a client waits for both in a round; far_ratio, that over
        bytes / bandwidth and two round trips.
    """
    near = _measured(_one_tensor(mib), "fedavg", "fp32", rounds, None)
    far = _measured(roberta_large_schema(), "fedsvd", "eden2", rounds, (rtt_ms / 1e3, mbit_s * 1e6 / 8))
    far_s = float(np.median([each["down_s"] + each["up_s"] for each in far]))
    least_s = (far[-1]["down"] + far[-1]["up"]) * 8 / (mbit_s * 1e6) + 2 * rtt_ms / 1e3
    return {
        "down_mib_s": float(np.median([each["down"] / _MIB / each["down_s"] for each in near])),
        "up_mib_s": float(np.median([each["up"] / _MIB / each["up_s"] for each in near])),
        "down_of_raw": float(np.median([each["raw_down_s"] / each["down_s"] for each in near])),
        "up_of_raw": float(np.median([each["raw_up_s"] / each["up_s"] for each in near])),
        "far_s": far_s,
        "far_ratio": far_s / least_s,
        "far_bytes": far[-1]["down"] + far[-1]["up"],
        "mib": mib,
        "rounds": rounds,
        "rtt_ms": rtt_ms,
        "mbit_s": mbit_s,
    }


def _one_tensor(mib: int) -> Schema:
    return Schema((TensorSpec("weight", "m", Role.BIAS, (mib * 256, 1024)),))


def _measured(
    schema: Schema, strategy: str, name: str, rounds: int, far: tuple[float, float] | None
) -> list[dict[str, float]]:
    """Seconds and bytes both ways of each round, as a client in a process of its own sees them."""
    config = RunConfig.model_validate(
        {
            "run": {"name": "bench-throughput", "rounds": rounds + 2},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "strategy": {"name": strategy},
            "wire": {"upload": name, "broadcast": name},
            "rounds": {"min_clients": 1},
        }
    )
    made = build_strategy(config)
    with (
        tempfile.TemporaryDirectory(prefix="fedloom-bench-") as held,
        Store(Path(held) / "state", durable=False) as store,
    ):
        folder = Path(held)
        certs = certificates(folder, [_NAME])[_NAME]
        coordinator = Coordinator(config, schema, made, store, starting=starting_adapter(schema, 0), expect=1)
        authority = folder / "authority"
        with (
            serving(coordinator, certs=authority) as address,
            _through(address, far) as port,
            raw_server(1, 4 * schema.size, [], authority) as raw,
        ):
            code = "import sys; from fedloom.simulation.benchmarks.throughput import transfer; transfer(*sys.argv[1:])"
            command = [sys.executable, "-c", code, port, str(certs), str(rounds + 1), "" if far else raw]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedloomError(f"the benchmark's client failed: {done.stderr.strip()[-500:]}")
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found[1:]


def transfer(address: str, certs: str, rounds: str, raw: str) -> None:
    """Take the rounds of a run that trains nothing, and print how long each transfer took; run in its own process.

    Args:
        address: HOST:PORT of the coordinator.
        certs: The client's folder of certificates.
        rounds: How many.
        raw: HOST:PORT of bare streams to compare with; empty for none.
    """
    line, held = GrpcConnection(address, Path(certs)), ""
    found: list[dict[str, float]] = []
    bare: RawExchange | None = None
    joined = line.join(_NAME, 1)
    while len(found) < int(rounds):
        asked = line.work(held)
        if not isinstance(asked, Assignment):
            continue
        schema = upload_schema(joined.schema, asked)
        body = codec(asked.upload_codec).encode(
            schema, {e.name: np.full(e.shape, 1e-3, np.float32) for e in schema.tensors}
        )
        digest = hashlib.sha256(body).hexdigest()
        header = UpdateHeader(_NAME, asked.round, schema.digest, asked.upload_codec, len(body), digest)
        parts = [(link.digest, link.bytes) for link in asked.links]
        parts = parts or [(asked.broadcast_digest, asked.broadcast_bytes)]
        began_s = time.perf_counter()
        for part in parts:
            line.fetch(*part)
        fetched_s = time.perf_counter()
        line.submit(header, body)
        spans = {"down_s": fetched_s - began_s, "up_s": time.perf_counter() - fetched_s}
        if raw:
            bare = RawExchange(raw, body, Path(certs)) if bare is None else bare
            for name, call in (("raw_down_s", bare.down), ("raw_up_s", bare.up)):
                began_s = time.perf_counter()
                call()
                spans[name] = time.perf_counter() - began_s
        found.append({"down": sum(size for _, size in parts), "up": len(body), **spans})
        held = asked.adapter
    print(json.dumps(found))


@contextmanager
def _through(address: str, far: tuple[float, float] | None) -> Iterator[str]:
    if far is None:
        yield address
        return
    with delayed(address, *far) as port:
        yield port


@contextmanager
def delayed(address: str, rtt_s: float, bytes_s: float) -> Iterator[str]:
    """A proxy to HOST:PORT whose lines have this round trip and, each way, this bandwidth: its own HOST:PORT."""
    host, _, port = address.rpartition(":")
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), [""]

    async def serve() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                their_reader, their_writer = await asyncio.open_connection(host, int(port))
                await asyncio.gather(
                    _pump(reader, their_writer, rtt_s / 2, bytes_s), _pump(their_reader, writer, rtt_s / 2, bytes_s)
                )

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        found[0] = f"localhost:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await server.serve_forever()

    thread = threading.Thread(target=_until_stopped, args=(loop, serve()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _until_stopped(loop: asyncio.AbstractEventLoop, work: Any) -> None:
    asyncio.set_event_loop(loop)
    task = loop.create_task(work)
    loop.run_forever()
    for each in {task, *asyncio.all_tasks(loop)}:
        each.cancel()
    loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
    loop.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, bytes_s: float) -> None:
    """Let bytes through, each at the earliest that the line allows, and then later by the delay."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)

    async def take() -> None:
        free_s = 0.0
        while data := await reader.read(16384):
            free_s = max(free_s, time.monotonic()) + len(data) / bytes_s
            await queue.put((free_s + delay_s, data))
            await asyncio.sleep(max(0.0, free_s - time.monotonic()))
        await queue.put((time.monotonic(), b""))

    taking = asyncio.create_task(take())
    try:
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if not data:
                break
            writer.write(data)
            await writer.drain()
    finally:
        taking.cancel()
        writer.close()
