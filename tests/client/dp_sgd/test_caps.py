"""Hours and bandwidth of a policy, against a real coordinator over a real socket."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session import participant as participant_module
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.transport import rate_limit as bandwidth_module
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Answer, Assignment, Joined, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 65_000)), TensorSpec("m.B", "m", Role.LORA_B, (65_000, 8))))
RATE = 256 << 10


class Steady:
    """Moves every value by one."""

    declared_examples = 1
    schema = SCHEMA

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        self.rounds.append(assignment.round)
        return Trained({s.name: np.ones(s.shape, np.float32) for s in upload_schema(SCHEMA, assignment).tensors}, None)

    def release(self, charge: int | None, digest: str) -> None:
        pass

    def drop(self, why: str | None) -> bool:
        return False


class Hours:
    """A site's hours, opened and closed by hand."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = threading.Event()

    def until_open_s(self, hours: str | None, _: object) -> float:
        assert hours == "22:00-06:00"
        if self.open.is_set():
            return 0.0
        self.asked.set()
        return 5.0


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Coordinator]:
    config = RunConfig.model_validate(
        {
            "run": {"name": "night", "rounds": 2},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": 1},
            "wire": {"upload": "fp32", "broadcast": "fp32"},
        }
    )
    with Store(tmp_path / "state", durable=False) as store:
        yield Coordinator(config, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 0))


def site(address: str, trainer: Steady, hours: str | None = None, rate: int | None = None) -> Participant:
    policy = Policy.model_validate(
        {
            "client": {"name": "ann"},
            "data": {"source": "none"},
            "privacy": {"allow_non_private": True},
            "compute": {"hours": hours} if hours else {},
        }
    )

    def prepare(_: Joined) -> Steady:
        return trainer

    connection = GrpcConnection(address, upload=rate, download=rate)
    return Participant(connection, policy, prepare, timing=Timing(rest_s=0.01))


def close(participant: Participant) -> None:
    assert isinstance(participant.connection, GrpcConnection)
    participant.connection.close()


def test_a_site_works_within_its_hours_only(
    made: Coordinator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hours, trainer = Hours(), Steady()
    monkeypatch.setattr(participant_module, "until_open_s", hours.until_open_s)
    work = GrpcConnection.work

    def asked(connection: GrpcConnection, held: str) -> Answer:
        """The hours end while the client asks for its second round."""
        answer = work(connection, held)
        if isinstance(answer, Assignment) and answer.round == 1 and not hours.asked.is_set():
            hours.open.clear()
        return answer

    joins: list[str] = []
    join = GrpcConnection.join

    def joining(connection: GrpcConnection, client: str, declared_examples: int) -> Joined:
        joins.append(client)
        return join(connection, client, declared_examples)

    monkeypatch.setattr(GrpcConnection, "work", asked)
    monkeypatch.setattr(GrpcConnection, "join", joining)
    with serving(made, linger_s=0.0) as address:
        participant = site(address, trainer, "22:00-06:00")
        thread = threading.Thread(target=participant.run, daemon=True)
        thread.start()
        assert hours.asked.wait(60)
        assert not joins
        hours.asked.clear()
        hours.open.set()
        assert hours.asked.wait(60)
        while "client 'ann' leaves: 'outside its hours'" not in caplog.text:
            threading.Event().wait(0.02)
        assert trainer.rounds == [0]
        hours.open.set()
        thread.join(120)
        close(participant)

    assert made.finished
    assert trainer.rounds == [0, 1]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = self.slept = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.mark.parametrize("rate", [None, RATE])
def test_payloads_keep_to_the_bandwidth(made: Coordinator, rate: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(bandwidth_module, "time", clock)
    with serving(made, linger_s=0.0) as address:
        participant = site(address, Steady(), rate=rate)
        participant.run()
        close(participant)

    moved = 2 * 2 * 4 * SCHEMA.size  # two rounds, down and up
    assert made.finished
    if rate is None:
        assert clock.slept == 0
    else:
        # Up and down each let one second's worth pass at first, and again after the other has taken its time.
        assert moved / rate - 4 <= clock.slept <= 1.01 * moved / rate
