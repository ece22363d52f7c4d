"""How long a round takes when nobody trains: transfer, bookkeeping and commit, over real sockets."""

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.policy import Policy
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import FedloomError
from fedloom.core.runtime.memory import keep_freed_memory
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Assignment, Joined, upload_schema
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.simulation.benchmarks.raw_grpc import RawExchange, raw_server
from fedloom.simulation.credentials import certificates
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_round", "idle_client", "roberta_large_schema"]

_WARM_UP = 10
"""Rounds before the first that counts."""


class _Idle:
    """Takes a round's work and returns it undone; in every second round after a bare exchange of the same bytes."""

    declared_examples = 1

    def __init__(self, schema: Schema, raw: RawExchange) -> None:
        self.schema, self._raw = schema, raw
        self._unmoved = schema.zeros()

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        """A change of zero."""
        if assignment.round % 2:
            self._raw()
        asked = upload_schema(self.schema, assignment).tensors
        return Trained({spec.name: self._unmoved[spec.name] for spec in asked}, None)

    def release(self, charge: int | None, digest: str) -> None:
        """Nothing is charged."""

    def drop(self, why: str | None) -> bool:
        """Nothing was charged."""
        return False


def roberta_large_schema() -> Schema:
    """LoRA r=8 on query and value of 24 layers of width 1024: 786,432 values."""
    specs: list[TensorSpec] = []
    for layer in range(24):
        for name in ("query", "value"):
            module = f"roberta.encoder.layer.{layer}.attention.self.{name}"
            specs.append(TensorSpec(f"{module}.lora_A.weight", module, Role.LORA_A, (8, 1024)))
            specs.append(TensorSpec(f"{module}.lora_B.weight", module, Role.LORA_B, (1024, 8)))
    return Schema(tuple(specs), scale=1.0)


def idle_client(address: str, raw_address: str, name: str, certs: str = "") -> None:
    """A client process that answers every round at once; without a folder of certificates, over plain text."""
    keep_freed_memory()
    policy = Policy.model_validate(
        {"client": {"name": name}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )

    def prepare(joined: Joined) -> _Idle:
        return _Idle(joined.schema, RawExchange(raw_address, bytes(4 * joined.schema.size)))

    Participant(GrpcConnection(address, Path(certs) if certs else None), policy, prepare).run()


def bench_round(*, rounds: int, clients: int, durable: bool, tls: bool) -> dict[str, Any]:
    """Run `rounds` empty rounds after a warm-up and time each from commit to commit.

    Between each two of them the same processes exchange the same bytes over bare gRPC, one stream down and one up for
    each client, never encrypted, see `raw_grpc`.

    Returns:
        median_ms, p95_ms, mean_ms. ratio_to_raw_grpc: median over the pairs of a round's time over that of the exchange
        before it; raw_grpc_ms, the median of those. Then what was measured.
    """
    config = RunConfig.model_validate(
        {
            "run": {"name": "bench-round", "rounds": _WARM_UP + 2 * rounds + 1},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": clients},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    schema = roberta_large_schema()
    commits: list[float] = []
    raw_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        store = stack.enter_context(Store(folder / "state", durable=durable))
        names = [f"client-{k}" for k in range(clients)]
        certs = certificates(folder, names) if tls else {}
        starting = starting_adapter(schema, 0)
        coordinator = Coordinator(config, schema, build_strategy(config), store, starting=starting, expect=clients)
        coordinator.on_commit = lambda _rounds, _state: commits.append(time.perf_counter())
        raw_address = stack.enter_context(raw_server(clients, 4 * schema.size, raw_s))
        with serving(coordinator, certs=folder / "authority" if tls else None) as address:
            code = "import sys; from fedloom.simulation.benchmarks.round import idle_client; idle_client(*sys.argv[1:])"
            running = [
                subprocess.Popen([sys.executable, "-c", code, address, raw_address, each, str(certs.get(each, ""))])
                for each in names
            ]
            try:
                while not coordinator.finished:
                    time.sleep(0.05)
                    if any(process.poll() not in (None, 0) for process in running):
                        raise FedloomError("a benchmark client failed; its own error is above")
                for process in running:
                    process.wait(30)
            finally:
                for process in running:
                    process.kill()
                    process.wait()
    # Round k lasted from commit k - 1 to commit k, and every odd one holds an exchange.
    spans_ms = 1e3 * np.diff(commits)[1::2][-rounds:]
    raw_ms = 1e3 * np.array(raw_s[-rounds:])
    return {
        "median_ms": float(np.median(spans_ms)),
        "p95_ms": float(np.percentile(spans_ms, 95)),
        "mean_ms": float(spans_ms.mean()),
        "ratio_to_raw_grpc": float(np.median(spans_ms / raw_ms)),
        "raw_grpc_ms": float(np.median(raw_ms)),
        "rounds": rounds,
        "clients": clients,
        "parameters": schema.size,
        "durable": durable,
        "tls": tls,
    }
