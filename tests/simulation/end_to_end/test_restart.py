"""Clients outlive a coordinator that is killed and started again on the same state directory, and one another."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.participant import Participant
from fedloom.client.transport.grpc import Connection, GrpcConnection
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Assignment, Finished, Joined, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import ClientLost, RoundClosed
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema(
    (
        TensorSpec("m.lora_A.weight", "m", Role.LORA_A, (2, 6)),
        TensorSpec("m.lora_B.weight", "m", Role.LORA_B, (4, 2)),
    )
)
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "restart", "rounds": 6, "seed": 1},
        "model": {"base": "none", "labels": ["a", "b"]},
        "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"enabled": False},
        "rounds": {"min_clients": 2},
    }
)

SERVE = """
import asyncio, sys
from pathlib import Path
from test_restart import CONFIG, SCHEMA
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serve
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
with Store(Path(sys.argv[1])) as store:
    coordinator = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1), expect=2)
    asyncio.run(serve(coordinator, sys.argv[2], ready=lambda address: print(address, flush=True)))
"""

DIE = """
import sys, threading
from test_restart import Steady, participant
from fedloom.client.transport.grpc import GrpcConnection
class Stuck(Steady):
    def train(self, run, assignment, broadcast, check_cancelled):
        print("training", flush=True)
        threading.Event().wait()
participant(GrpcConnection(sys.argv[1]), 2, threading.Semaphore(0), Stuck).run()
"""


class Steady:
    """Moves every value by an amount that depends on the client and the round alone."""

    declared_examples = 1
    schema = SCHEMA

    def __init__(self, client: int, trained: threading.Semaphore) -> None:
        self.client, self.trained = client, trained

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        rng = np.random.default_rng([self.client, assignment.round])
        schema = upload_schema(SCHEMA, assignment)
        self.trained.release()
        return Trained({s.name: rng.normal(size=s.shape).astype(np.float32) for s in schema.tensors}, None)

    def release(self, charge: int | None, digest: str) -> None:
        pass

    def drop(self, why: str | None) -> bool:
        return False


def participant(
    connection: Connection, client: int, trained: threading.Semaphore, kind: type[Steady] = Steady
) -> Participant:
    policy = Policy.model_validate(
        {"client": {"name": f"c{client}"}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )

    def prepare(_: Joined) -> Steady:
        return kind(client, trained)

    return Participant(connection, policy, prepare)


def take_part(address: str, client: int, trained: threading.Semaphore, ends: list[Finished]) -> None:
    ends.append(participant(GrpcConnection(address), client, trained).run(patience_s=60))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(state: Path, address: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(state), address], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == address
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.wait(30)
    if process.stdout is not None:
        process.stdout.close()


def undisturbed(folder: Path) -> Tensors:
    """The adapter of the same run without a socket or a restart."""
    # Loads torch. The coordinator's process imports this file too, and is to be back before its clients give up.
    from fedloom.server.rpc.local import LocalConnection

    with Store(folder, durable=False) as store:
        coordinator = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1))
        trained = threading.Semaphore(0)
        participants = [participant(LocalConnection(coordinator), client, trained) for client in range(2)]
        for each in participants:
            each.join()
        while not coordinator.finished:
            for each in participants:
                each.step()
        return coordinator.state.adapter


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_coordinator_goes_on_with_the_same_result(tmp_path: Path, how: signal.Signals) -> None:
    address = f"127.0.0.1:{free_port()}"
    trained = threading.Semaphore(0)
    ends: list[Finished] = []
    process = start(tmp_path / "state", address)
    threads = [threading.Thread(target=take_part, args=(address, k, trained, ends)) for k in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):  # somewhere in the second round
            assert trained.acquire(timeout=60)
        process.send_signal(how)
        end(process)
        time.sleep(0.2)
        process = start(tmp_path / "state", address)
        for thread in threads:
            thread.join(90)
        assert process.wait(60) == 0
    finally:
        process.kill()
        end(process)

    assert [end.rounds for end in ends] == [6, 6]
    with Store(tmp_path / "state") as store:
        resumed = Coordinator(CONFIG, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1)).state.adapter
    expected = undisturbed(tmp_path / "reference")
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.e2e
def test_a_round_closes_without_a_client_that_is_killed_while_it_trains(tmp_path: Path) -> None:
    patient = CONFIG.rounds.model_copy(update={"lease_s": 5.0})
    config = CONFIG.model_copy(update={"rounds": patient})
    trained = threading.Semaphore(0)
    ends: list[Finished] = []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with Store(tmp_path / "state", durable=False) as store:
        coordinator = Coordinator(config, SCHEMA, FedAvg(), store, starting=starting_adapter(SCHEMA, 1), expect=3)
        with serving(coordinator) as address:
            command = [sys.executable, "-c", DIE, address]
            victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            threads = [
                threading.Thread(target=take_part, args=(address, k, trained, ends), daemon=True) for k in range(2)
            ]
            for thread in threads:
                thread.start()
            try:
                assert victim.stdout is not None
                assert victim.stdout.readline() == "training\n"
            finally:
                victim.kill()
                end(victim)
            for thread in threads:
                thread.join(90)
        events = store.events()

    assert [end.rounds for end in ends] == [6, 6]
    # On a busy machine the others may miss a lease too, and come back.
    assert ClientLost(0, "c2", "lease") in events
    closed = [event.clients for event in events if isinstance(event, RoundClosed)]
    assert closed == [("c0", "c1")] * 6


def test_a_client_refuses_plain_text_beyond_loopback() -> None:
    with pytest.raises(ConfigError, match="not a loopback address"):
        GrpcConnection("10.1.2.3:8470")
