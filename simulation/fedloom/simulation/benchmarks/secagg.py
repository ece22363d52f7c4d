"""What a secure sum costs a round: the same federation with and without it, over real sockets, in turn."""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.policy import Policy
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import FedloomError
from fedloom.core.runtime.memory import keep_freed_memory
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Assignment, Joined
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_secagg", "summing_client"]

_VARIANTS = ("plain", "secure")
_WARM_UP = 2
_TRAIN = "import sys; from fedloom.simulation.benchmarks.secagg import summing_client; summing_client(*sys.argv[1:])"


class _Drawn:
    """Returns the same random change every round, so that what is timed is everything but training."""

    declared_examples = 1

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        rng = np.random.default_rng()
        self._delta = {each.name: rng.normal(0, 0.01, each.shape).astype(np.float32) for each in schema.tensors}

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        """The change drawn at the start."""
        return Trained(self._delta, None)

    def release(self, charge: int | None, digest: str) -> None:
        """Nothing is charged."""

    def drop(self, why: str | None) -> bool:
        """Nothing was charged."""
        return False


def _schema(parameters: int) -> Schema:
    """LoRA pairs of rank 8 between widths of 1024, and a bias for what is left."""
    specs: list[TensorSpec] = []
    for layer in range(parameters // 16_384):
        specs.append(TensorSpec(f"layer.{layer}.lora_A", f"layer.{layer}", Role.LORA_A, (8, 1024)))
        specs.append(TensorSpec(f"layer.{layer}.lora_B", f"layer.{layer}", Role.LORA_B, (1024, 8)))
    if parameters % 16_384:
        specs.append(TensorSpec("rest", "rest", Role.BIAS, (parameters % 16_384,)))
    return Schema(tuple(specs), scale=1.0)


def summing_client(folder: str, name: str, *addresses: str) -> None:
    """A client process: for each line on its standard input one round at the address of that number.

    It answers with the CPU seconds the round has cost it.
    """
    keep_freed_memory()
    state = Path(folder)
    peers = {each.name: public_text(load_identity(each)) for each in sorted(state.iterdir())}
    policy = Policy.model_validate(
        {
            "client": {"name": name, "state": state / name},
            "data": {"source": "none"},
            "privacy": {"allow_non_private": True},
            "secure_aggregation": {"peers": peers},
        }
    )

    def prepare(joined: Joined) -> _Drawn:
        return _Drawn(joined.schema)

    participants = [Participant(GrpcConnection(address), policy, prepare) for address in addresses]
    for participant in participants:
        participant.join()
    for line in sys.stdin:
        participant, before = participants[int(line)], time.process_time()
        done = participant.rounds_trained
        while participant.rounds_trained == done:
            participant.step()
        print(time.process_time() - before, flush=True)


@dataclass
class _Side:
    """One of the two coordinators, and when its rounds were committed."""

    coordinator: Coordinator
    committed: threading.Event
    at_s: float = 0.0

    def commit(self, rounds: int, state: object) -> None:
        """The coordinator's hook."""
        self.at_s = time.perf_counter()
        self.committed.set()


def bench_secagg(*, rounds: int, clients: int, parameters: int) -> dict[str, Any]:
    """Time `rounds` rounds of each kind in turn, from the word to begin until the commit, after two to warm up.

    Every client is a process; the coordinators share this one. A round is everything but training: work, broadcast,
    upload, for a secure one all its steps, and the commit. Nothing is synced to disk.

    Returns:
        ratio: median over the pairs of a secure round's time over that of the plain round before it. ratio_cpu: median
        CPU time of all processes together in a secure round over that in a plain one, which says more where other work
        shares the machine. Then the medians in milliseconds of both rounds, and of the CPU time of the median client
        and of the coordinator.
    """
    schema = _schema(parameters)
    spans_ms: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    client_ms: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    server_ms: dict[str, list[float]] = {name: [] for name in _VARIANTS}
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        sides = [_open(stack, folder, schema, variant, rounds, clients) for variant in _VARIANTS]
        addresses = [stack.enter_context(serving(side.coordinator)) for side in sides]
        running = _start(stack, folder / "clients", clients, addresses)
        for number in range(_WARM_UP + rounds):
            for index, (variant, side) in enumerate(zip(_VARIANTS, sides, strict=True)):
                span_s, server_s, client_s = _round(running, index, side)
                if number >= _WARM_UP:
                    spans_ms[variant].append(1e3 * span_s)
                    server_ms[variant].append(1e3 * server_s)
                    client_ms[variant].append(1e3 * client_s)
    pairs = zip(spans_ms["secure"], spans_ms["plain"], strict=True)
    cpu_ms = {
        name: statistics.median(
            server + clients * client for server, client in zip(server_ms[name], client_ms[name], strict=True)
        )
        for name in _VARIANTS
    }
    figures: dict[str, Any] = {"ratio": statistics.median(secure / plain for secure, plain in pairs)}
    figures["ratio_cpu"] = cpu_ms["secure"] / cpu_ms["plain"]
    for variant in _VARIANTS:
        figures[f"{variant}_ms"] = statistics.median(spans_ms[variant])
        figures[f"{variant}_client_cpu_ms"] = statistics.median(client_ms[variant])
        figures[f"{variant}_server_cpu_ms"] = statistics.median(server_ms[variant])
    return {**figures, "rounds": rounds, "clients": clients, "parameters": schema.size, "tls": False}


def _open(stack: ExitStack, folder: Path, schema: Schema, variant: str, rounds: int, clients: int) -> _Side:
    config = RunConfig.model_validate(
        {
            "run": {"name": f"bench-{variant}", "rounds": _WARM_UP + rounds + 1},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": clients, "lease_s": 600.0},
            "secure_aggregation": {"enabled": variant == "secure"},
        }
    )
    store = stack.enter_context(Store(folder / variant, durable=False))
    coordinator = Coordinator(
        config, schema, FedAvg(train_head=False), store, starting=starting_adapter(schema, 0), expect=clients
    )
    side = _Side(coordinator, threading.Event())
    coordinator.on_commit = side.commit
    return side


def _start(stack: ExitStack, folder: Path, clients: int, addresses: list[str]) -> "list[subprocess.Popen[str]]":
    names = [f"client-{number:03d}" for number in range(clients)]
    for name in names:
        load_identity(folder / name)
    running: list[subprocess.Popen[str]] = []
    for name in names:
        command = [sys.executable, "-c", _TRAIN, str(folder), name, *addresses]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        stack.callback(_end, process)
        running.append(process)
    return running


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _round(running: "list[subprocess.Popen[str]]", index: int, side: _Side) -> tuple[float, float, float]:
    """One round of all clients: its span, the coordinators' CPU time and the median client's, all in seconds."""
    side.committed.clear()
    server_s, began_s = time.process_time(), time.perf_counter()
    for process in running:
        assert process.stdin is not None  # it was opened as a pipe
        process.stdin.write(f"{index}\n")
    spent_s: list[float] = []
    for process in running:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise FedloomError("a benchmark client failed; its own error is above")
        spent_s.append(float(line))
    if not side.committed.wait(60):
        raise FedloomError("a benchmark round was not committed within 60 s of its last update")
    return side.at_s - began_s, time.process_time() - server_s, statistics.median(spent_s)
