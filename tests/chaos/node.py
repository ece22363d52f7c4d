"""The two kinds of process of a trial: a coordinator and a client. Failpoints are armed before this is imported."""

import asyncio
import logging
import threading
import time
from pathlib import Path

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger import ledger as ledger_module
from fedloom.client.privacy.ledger.account import anchors_folder, ledger_folder, outbox_folder
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.transport import tls as channel_module
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.runtime import failpoints
from fedloom.core.schema import Tensors
from fedloom.proto.messages import Assignment, Joined, UpdateHeader
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.server import serve
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from tests.chaos.trial import BUDGET, DELTA, SCHEMA, SPEND, Trial, begun, change, note, sent_digests

ACCOUNT = "sha256:" + "0" * 64


def policy_of(name: str, folder: Path) -> Policy:
    """A site whose whole state lies in `folder`."""
    return Policy.model_validate(
        {
            "client": {"name": name, "state": str(folder), "anchors": str(folder / "anchors")},
            "data": {"source": "none", "labels": ["a", "b"], "declared_examples": 100},
            "privacy": {"epsilon": BUDGET, "delta": DELTA, "allow_non_private": True},
        }
    )


def account_of(policy: Policy) -> Ledger:
    """The site's ledger, opened as a client opens it."""
    return Ledger(ledger_folder(policy), ACCOUNT, anchors=anchors_folder(policy))


class Recording(GrpcConnection):
    """The real line, with a note of each update before its first byte leaves."""

    folder = Path()

    def join(self, client: str, declared_examples: int) -> Joined:
        joined = super().join(client, declared_examples)
        note(self.folder / "joined.log", f"{joined.epoch} {time.time()} {client}")
        return joined

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        note(self.folder / "sent.log", f"{header.round} {header.digest}")
        return super().submit(header, payload)


class Steady:
    """Charges and computes a round as the real trainer does, without a model."""

    declared_examples = 1
    schema = SCHEMA

    def __init__(self, name: str, folder: Path, ledger: Ledger | None, pause_s: float) -> None:
        self.name, self.folder, self.ledger, self.pause_s = name, folder, ledger, pause_s

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        charge = None
        if self.ledger is not None:
            charge = self.ledger.reserve(run, assignment.round, SPEND, budget=BUDGET, delta=DELTA)
        note(self.folder / "drawn.log", f"{assignment.round} {charge}")
        check_cancelled()
        time.sleep(self.pause_s)
        if self.ledger is None:
            return Trained(change(self.name, assignment.round, 0, broadcast), None)
        again = len(sent_digests(self.folder / "sent.log").get(assignment.round, ()))
        return Trained(change(self.name, assignment.round, again, broadcast), charge)

    def release(self, charge: int | None, digest: str) -> None:
        if self.ledger is not None:
            assert charge is not None
            self.ledger.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.ledger is not None and self.ledger.drop(why)


def run_server(trial: Trial, folder: Path, address: str) -> int:
    """Serve the run until it is over; 0 if it is."""
    with Store(folder / "state") as store:
        starting = begun(trial).adapter
        coordinator = Coordinator(trial.config, SCHEMA, FedAvg(), store, starting=starting, expect=trial.clients)

        def ready(at: str) -> None:
            note(folder / "ready.log", f"{store.epoch} {time.time()}")

        asyncio.run(serve(coordinator, address, ready=ready, linger_s=trial.linger_s))
        return 0 if coordinator.finished else 3


def run_client(trial: Trial, folder: Path, address: str, name: str) -> int:
    """Take part until the run is over."""
    # Nobody looks after a client that was killed time and again.
    ledger_module.MOST_FAILURES = 10**9
    # A heartbeat in every training, and a short pause after every failure: trials last seconds.
    timing = Timing(heartbeat_s=trial.pause_s / 2, backoff_s=(0.05, 0.5))
    folder.mkdir(exist_ok=True)
    policy = policy_of(name, folder)
    connection = Recording(address)
    connection.folder = folder

    def prepare(_: Joined) -> Steady:
        return Steady(name, folder, account_of(policy), trial.pause_s)

    participant = Participant(connection, policy, prepare, outbox=outbox_folder(policy), timing=timing)
    participant.run(patience_s=120)
    connection.close()
    return 0


def run_crowd(trial: Trial, folder: Path, address: str, name: str) -> int:
    """Take part as many clients, each in a thread with a connection of its own."""
    # In one process channels to one address share a connection unless they are told not to.
    channel_module._OPTIONS = [*channel_module._OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    folder.mkdir(exist_ok=True)
    mine = trial.names[int(name.removeprefix("crowd")) :: trial.crowd]
    finished: list[str] = []

    def take_part(client: str) -> None:
        connection = Recording(address)
        connection.folder = folder
        trainer = Steady(client, folder, None, trial.pause_s)
        Participant(connection, policy_of(client, folder), lambda _: trainer).run(patience_s=120)
        finished.append(client)

    threads = [threading.Thread(target=take_part, args=(client,)) for client in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0 if sorted(finished) == sorted(mine) else 4


def main(task: dict[str, object], folder: Path) -> int:
    """One node's whole life: `task` has the trial, the address and the client's name, or "" for the coordinator."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    trial, address, name = Trial(**task["trial"]), str(task["address"]), str(task["name"])  # type: ignore[arg-type]
    if not name:
        status = run_server(trial, folder, address)
    else:
        run = run_crowd if trial.crowd else run_client
        status = run(trial, folder / name, address, name)
    for point, count in failpoints.hits.items():
        note(folder / "hits.log", f"{name or 'server'} {point} {count}")
    return status
