"""Buffered rounds over real sockets: a slow client, a coordinator that is killed, and the sum that numpy gives."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Assignment, Finished, Joined, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import Event, RoundClosed, UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.buffered import Buffered

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 6)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))))
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "buffered", "rounds": 6, "seed": 1},
        "model": {"base": "none", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
        "strategy": {"weighting": "examples"},
        "rounds": {"mode": "buffered", "clients_per_round": 2, "min_clients": 2, "lease_s": 600.0},
    }
)
EXAMPLES = {"quick": 10, "steady": 20, "slow": 40}

SERVE = """
import asyncio, sys
from pathlib import Path
from test_buffered_restart import reopened
from fedloom.server.rpc.server import serve
from fedloom.server.storage.local import Store
with Store(Path(sys.argv[1])) as store:
    asyncio.run(serve(reopened(store), sys.argv[2], ready=lambda address: print(address, flush=True)))
"""


def reopened(store: Store) -> Coordinator:
    starting = starting_adapter(SCHEMA, 1)
    return Coordinator(CONFIG, SCHEMA, Buffered(FedAvg()), store, starting=starting, expect=len(EXAMPLES))


def change(client: str, round: int) -> dict[str, np.ndarray]:
    """What a client makes of the state at the start of a round."""
    rng = np.random.default_rng([round, *client.encode()])
    return {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in SCHEMA.tensors}


class Held:
    """Trains at once, but for one round of which it waits to be told."""

    schema = SCHEMA

    def __init__(self, client: str, round: int) -> None:
        self.client, self.round, self.declared_examples = client, round, EXAMPLES[client]
        self.started, self.told, self.later = threading.Event(), threading.Event(), threading.Event()

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        if assignment.round == self.round:
            self.started.set()
            assert self.told.wait(120)
        if assignment.round > self.round:
            self.later.set()
        assert upload_schema(SCHEMA, assignment) == SCHEMA
        return Trained(change(self.client, assignment.round), None)

    def release(self, charge: int | None, digest: str) -> None:
        pass

    def drop(self, why: str | None) -> bool:
        return False


def live(trainer: Held, address: str, ends: list[Finished]) -> threading.Thread:
    """A thread in which a client lives until the run is over."""
    policy = Policy.model_validate(
        {"client": {"name": trainer.client}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )

    def prepare(_: Joined) -> Held:
        return trainer

    def run() -> None:
        connection = GrpcConnection(address)
        ends.append(Participant(connection, policy, prepare).run(patience_s=60))
        connection.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def start(state: Path, address: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SERVE, str(state), address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == address
    return process


def end(process: "subprocess.Popen[str]") -> int:
    code = process.wait(60)
    if process.stdout is not None:
        process.stdout.close()
    return code


def by_hand(events: list[Event]) -> dict[str, np.ndarray]:
    """FedBuff in float64, from who was in which buffer: w + sum_k n_k delta_k / sqrt(1 + s_k) / sum_k n_k."""
    state = {name: tensor.astype(np.float64) for name, tensor in starting_adapter(SCHEMA, 1).items()}
    waiting: dict[str, UpdateAccepted] = {}
    for event in events:
        if isinstance(event, UpdateAccepted):
            waiting[event.client] = event
        elif isinstance(event, RoundClosed):
            total = sum(EXAMPLES[client] for client in event.clients)
            for client in event.clients:
                begun = waiting.pop(client).round
                share = EXAMPLES[client] / total / math.sqrt(1 + event.round - begun)
                for name, delta in change(client, begun).items():
                    state[name] += share * delta
            assert not waiting
    return state


@pytest.mark.e2e
def test_a_stale_update_counts_by_its_age_after_the_coordinator_was_killed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = "{}:{}".format(*probe.getsockname())
    quick, steady, slow = trainers = Held("quick", 2), Held("steady", 2), Held("slow", 0)
    ends: list[Finished] = []
    process = start(tmp_path / "state", address)
    try:
        threads = [live(each, address, ends) for each in trainers]
        # Two rounds go by without the slow one, and everybody is at work when the coordinator dies.
        assert all(each.started.wait(60) for each in trainers)
        process.send_signal(signal.SIGKILL)
        end(process)
        process = start(tmp_path / "state", address)
        slow.told.set()
        quick.told.set()
        assert slow.later.wait(60), "it is asked again once its update has counted"
        steady.told.set()
        for thread in threads:
            thread.join(90)
        assert end(process) == 0
    finally:
        process.kill()
        end(process)

    assert [each.rounds for each in ends] == [6, 6, 6]
    with Store(tmp_path / "state") as store:
        events, found = store.events(), reopened(store).state.adapter
    closed = [event.clients for event in events if isinstance(event, RoundClosed)]
    assert closed[:3] == [("quick", "steady"), ("quick", "steady"), ("quick", "slow")]
    assert len(closed) == 6
    expected = by_hand(events)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5)
