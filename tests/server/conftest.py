import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, Finished, UpdateHeader, Wait, broadcast_schema, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Strategy
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.buffered import Buffered

SCHEMA = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (2, 5)),
        TensorSpec("m.B", "m", Role.LORA_B, (4, 2)),
        TensorSpec("head", "head", Role.HEAD, (2, 4)),
    )
)
FEDAVG = FedAvg()


def config(length: int = 2, **sections: dict[str, object]) -> RunConfig:
    tables: dict[str, object] = {
        "run": {"name": "trial", "rounds": length, "seed": 3},
        "model": {"base": "tiny", "labels": ["no", "yes"]},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
        "rounds": {"min_clients": 2, "deadline_s": 100.0, "lease_s": 10.0},
    }
    for name, section in sections.items():
        known = tables.get(name, {})
        assert isinstance(known, dict)
        tables[name] = {**known, **section}
    return RunConfig.model_validate(tables)


@dataclass
class Federation:
    """A coordinator and as many clients as somebody speaks for."""

    store: Store
    config: RunConfig = field(default_factory=config)
    strategy: Strategy = FEDAVG
    now_s: float = 0.0
    expect: int = 0
    clock: Callable[[], float] | None = None
    runs: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starting = starting_adapter(SCHEMA, self.config.run.seed)
        self.coordinator = Coordinator(
            self.config,
            SCHEMA,
            Buffered(self.strategy) if self.config.rounds.mode == "buffered" else self.strategy,
            self.store,
            starting=starting,
            clock=self.clock or (lambda: self.now_s),
            expect=self.expect,
        )

    def join(self, *clients: str, examples: int = 0) -> None:
        for client in clients:
            joined = self.coordinator.join(client, 1, examples)
            self.runs[client] = joined.run, joined.epoch

    def work(self, client: str) -> Assignment | Wait | Finished:
        return self.coordinator.work(client, *self.runs[client])

    def assignment(self, client: str) -> Assignment:
        answer = self.work(client)
        assert isinstance(answer, Assignment)
        return answer

    def update(self, client: str, shift: float | None = None) -> tuple[UpdateHeader, bytes]:
        """What `client` sends for its assignment: drawn from its name, the round and the broadcast."""
        assignment = self.assignment(client)
        derived = upload_schema(SCHEMA, assignment)
        broadcast = self.coordinator.blob(client, assignment.broadcast_digest, *self.runs[client])
        start = codec(assignment.broadcast_codec).decode(broadcast_schema(SCHEMA, assignment), broadcast)
        seed = int.from_bytes(hashlib.sha256(f"{client} {assignment.round}".encode()).digest()[:8], "big")
        noise = np.random.default_rng(seed)
        delta = {
            spec.name: (0.1 * start[spec.name] + noise.normal(size=spec.shape)).astype(np.float32)
            if shift is None
            else np.full(spec.shape, shift, np.float32)
            for spec in derived.tensors
        }
        payload = codec(assignment.upload_codec).encode(derived, delta)
        digest = hashlib.sha256(payload).hexdigest()
        header = UpdateHeader(client, assignment.round, derived.digest, assignment.upload_codec, len(payload), digest)
        return header, payload

    def send(self, header: UpdateHeader, payload: bytes) -> bool:
        return self.coordinator.submit(header, payload, *self.runs[header.client])

    def begin(self, *clients: str, examples: int = 0) -> None:
        self.join(*clients, examples=examples)
        for client in clients:
            self.work(client)

    def adapter(self) -> dict[str, list[float]]:
        return {name: tensor.ravel().tolist() for name, tensor in self.coordinator.state.adapter.items()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A state directory that need not outlive the test."""
    with Store(tmp_path / "state", durable=False) as opened:
        yield opened


@pytest.fixture
def federate() -> type[Federation]:
    """The class itself: test modules cannot import it."""
    return Federation


@pytest.fixture
def configure() -> Callable[..., RunConfig]:
    """A run file with sections changed."""
    return config
