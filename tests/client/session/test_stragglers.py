"""A client whose round closes without it stops training, keeps its charge, sends nothing, and takes part again."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled, RoundCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.client.transport.grpc import GrpcConnection
from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import Forbidden, IdentityError, ProtocolError, Unavailable
from fedloom.core.privacy.accounting import Spend
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Answer, Assignment, Finished, Joined, RoundStatus, UpdateHeader, upload_schema
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import RoundClosed
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.start import starting_adapter

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)), TensorSpec("m.B", "m", Role.LORA_B, (8, 1))))
ROLES = SCHEMA.roles
PAYLOAD = codec("fp32").encode(SCHEMA, SCHEMA.zeros())
FINISHED = Finished(9, "fp32", "0" * 64, 0)
SPEND = Spend(0.1, 1.0, 1)
STEPS = 3000
"""Of a training that nobody ends: half a minute, much longer than any heartbeat takes."""
QUICK = Timing(heartbeat_s=0.01, backoff_s=(0.02, 0.2))


class Slow:
    """Charges a round and takes many steps for those that `slow` names, none for others."""

    declared_examples = 1
    schema = SCHEMA

    def __init__(self, ledger: Ledger, slow: frozenset[int] = frozenset({0}), *, swallows: bool = False) -> None:
        self.ledger, self.slow, self.swallows = ledger, slow, swallows
        self.at_work, self.stopped = threading.Event(), list[int]()
        self.enough: Callable[[], bool] = lambda: False

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        charge = self.ledger.reserve(run, assignment.round, SPEND, budget=50, delta=1e-5)
        try:
            for _ in range(STEPS if assignment.round in self.slow else 0):
                check_cancelled()
                self.at_work.set()
                if self.enough():
                    break
                threading.Event().wait(0.01)
        except RoundCancelled:
            self.stopped.append(assignment.round)
            if not self.swallows:
                raise
        return Trained(
            {spec.name: np.ones(spec.shape, np.float32) for spec in upload_schema(SCHEMA, assignment).tensors}, charge
        )

    def release(self, charge: int | None, digest: str) -> None:
        assert charge is not None
        self.ledger.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.ledger.drop(why)


class Noting(GrpcConnection):
    """The real line, with a note of what is sent."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.sent: list[int] = []

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.sent.append(header.round)
        return super().submit(header, payload)


def policy_of(name: str) -> Policy:
    return Policy.model_validate(
        {"client": {"name": name}, "data": {"source": "none"}, "privacy": {"allow_non_private": True}}
    )


def coordinator(store: Store, clock: Callable[[], float], **rounds: object) -> Coordinator:
    run = RunConfig.model_validate(
        {
            "run": {"name": "stragglers", "rounds": 2},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "rounds": {"min_clients": 1, "deadline_s": 10.0, "lease_s": 1e6, **rounds},
        }
    )
    strategy = build_strategy(run)
    return Coordinator(run, SCHEMA, strategy, store, starting=starting_adapter(SCHEMA, 0), clock=clock, expect=2)


def until(true: Callable[[], bool]) -> None:
    for _ in range(STEPS):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never comes to that")


@dataclass
class Site:
    """A client over a real socket, in a thread of its own."""

    address: str
    name: str
    folder: Path
    slow: frozenset[int]
    ends: list[Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder / self.name / "ledger", "ab")
        self.trainer, self.line = Slow(self.ledger, self.slow), Noting(self.address)
        self.outbox = self.folder / self.name / "outbox"
        self.participant = Participant(
            self.line, policy_of(self.name), lambda _: self.trainer, outbox=self.outbox, timing=QUICK
        )
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def _live(self) -> None:
        self.ends.append(self.participant.run(patience_s=60))

    def close(self) -> None:
        self.thread.join(60)
        self.line.close()
        self.ledger.close()


@pytest.mark.e2e
def test_a_straggler_stops_keeps_its_charge_and_takes_part_in_the_next_round(tmp_path: Path) -> None:
    now_s = 0.0
    with Store(tmp_path / "state", durable=False) as store:
        made = coordinator(store, lambda: now_s)
        with serving(made) as address:
            ann = Site(address, "ann", tmp_path, frozenset())
            ben = Site(address, "ben", tmp_path, frozenset({0}))
            assert ben.trainer.at_work.wait(30)
            until(lambda: "ann" in made.progress.submitted)
            assert ben.trainer.stopped == [], "the round is open"
            now_s = 11.0
            until(lambda: made.finished)
            ann.close()
            ben.close()
        closed = [event.clients for event in store.events() if isinstance(event, RoundClosed)]

    assert closed == [("ann",), ("ann", "ben")]
    assert ben.trainer.stopped == [0]
    assert [end.rounds for end in (*ann.ends, *ben.ends)] == [2, 2]
    assert ben.line.sent == [1], "nothing of the half-done training left"
    with Ledger(tmp_path / "ben" / "ledger", "ab") as ledger:
        charges = ledger.charges()
    assert [(charge.round, charge.digest is None) for charge in charges] == [(0, True), (1, False)]
    assert ben.participant.rounds_trained == 1


@pytest.mark.e2e
def test_in_buffered_rounds_a_client_goes_on_as_long_as_its_update_is_taken(tmp_path: Path) -> None:
    rules = {"mode": "buffered", "clients_per_round": 1, "max_staleness": 1}
    with Store(tmp_path / "state", durable=False) as store:
        made = coordinator(store, lambda: 0.0, **rules)
        with serving(made) as address:
            ben = Site(address, "ben", tmp_path, frozenset({0}))
            told: list[RoundStatus] = []
            heartbeat = ben.line.heartbeat

            def noted() -> RoundStatus:
                told.append(heartbeat())
                return told[-1]

            ben.line.heartbeat = noted  # type: ignore[method-assign]
            until(lambda: "ben" in made.progress.live)
            ann = Site(address, "ann", tmp_path, frozenset({1}))
            assert ben.trainer.at_work.wait(30)
            assert ann.trainer.at_work.wait(30), "the first round is committed without ben"
            until(lambda: sum(standing.round == 1 for standing in told) > 2)
            assert ben.trainer.stopped == []
            ben.trainer.enough = lambda: True
            until(lambda: made.finished)
            ben.close()
            ann.close()
        closed = [event.clients for event in store.events() if isinstance(event, RoundClosed)]

    assert closed == [("ann",), ("ben",)]
    assert ben.line.sent == [0]
    assert ann.trainer.stopped == [1], "the run is over, so it is not needed any more"
    assert ann.line.sent == [0]


@dataclass
class Line:
    """A coordinator that answers every heartbeat alike and keeps what arrives."""

    spec: Spec
    standing: RoundStatus | Exception
    sent: list[int] = field(default_factory=list)
    heard: list[RoundStatus | Exception] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    slow_fetch: bool = False

    def join(self, client: str, declared_examples: int) -> Joined:
        longer = self.spec.run.model_copy(update={"rounds": 10})
        return Joined("run-1", 1, self.spec.model_copy(update={"run": longer}), SCHEMA)

    def work(self, held: str = "") -> Answer:
        return self.answers.pop(0)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        if self.slow_fetch:
            before = len(self.heard)  # some are heard before the round is known
            until(lambda: len(self.heard) > before + 2)
        return PAYLOAD

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.sent.append(header.round)
        return False

    def exchange(self, message: object) -> None:
        raise AssertionError("no secure sum here")

    def heartbeat(self) -> RoundStatus:
        self.heard.append(self.standing)
        if isinstance(self.standing, Exception):
            raise self.standing
        return self.standing

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None: ...


def told(
    standing: RoundStatus | Exception,
    spec: Spec,
    policy: Policy,
    folder: Path,
    *,
    swallows: bool = False,
    slow_fetch: bool = False,
) -> tuple[Line, Slow, list[int]]:
    """One round of number 3 in which every heartbeat hears the same; the line, the trainer, and the rounds charged."""
    order = Assignment(3, ROLES, ROLES, hashlib.sha256(PAYLOAD).hexdigest(), len(PAYLOAD))
    line = Line(spec, standing, answers=[order, FINISHED], slow_fetch=slow_fetch)
    with Ledger(folder / "ledger", "ab") as ledger:
        trainer = Slow(ledger, frozenset({3}), swallows=swallows)
        trainer.enough = lambda: len(line.heard) > 5
        participant = Participant(line, policy, lambda _: trainer, outbox=folder / "outbox", timing=QUICK)
        assert participant.run() == FINISHED
        assert all((charge.digest is None) == (line.sent == []) for charge in ledger.charges())
        return line, trainer, [charge.round for charge in ledger.charges()]


GOES_ON = {
    "its round is open": RoundStatus(3, True, 3),
    "its round missed its quorum and opens again": RoundStatus(3, False, 3),
    "a buffered round takes it later": RoundStatus(7, True, 3),
    "a coordinator of an earlier build, which says nothing of it": RoundStatus(9, True, 0),
    "one that was started again, in another epoch": ProtocolError("epoch 2 is open, not 1; join again"),
    "no line": Unavailable("gone"),
}


@pytest.mark.parametrize("standing", GOES_ON.values(), ids=GOES_ON)
def test_a_client_that_may_still_be_waited_for_goes_on(
    standing: RoundStatus | Exception, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    line, trainer, charged = told(standing, spec, policy, tmp_path)

    assert len(line.heard) > 5
    assert trainer.stopped == []
    assert (line.sent, charged) == ([3], [3])


@pytest.mark.parametrize(
    "standing",
    [
        RoundStatus(4, False, 4),
        RoundStatus(9, True, 5),
        Forbidden("the certificate is revoked"),
        IdentityError("ended"),
    ],
    ids=["synchronous", "buffered", "revoked", "not known any more"],
)
@pytest.mark.parametrize("swallows", [False, True])
def test_a_client_that_is_waited_for_no_more_sends_nothing(
    standing: RoundStatus | Exception, swallows: bool, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    line, trainer, charged = told(standing, spec, policy, tmp_path, swallows=swallows)

    assert trainer.stopped == [3]
    assert (line.sent, charged) == ([], [3])
    assert list((tmp_path / "outbox").glob("*")) == []


def test_a_round_that_closes_while_its_broadcast_comes_is_not_charged(
    spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    line, trainer, charged = told(RoundStatus(4, True, 4), spec, policy, tmp_path, slow_fetch=True)

    assert not trainer.at_work.is_set()
    assert (line.sent, charged) == ([], [])


@pytest.mark.parametrize("private", [True, False])
def test_a_training_that_is_stopped_leaves_its_charge_and_nothing_else(
    private: bool, tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    if not private:
        spec = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})
    roles = tiny_model.schema.roles
    kept = frozenset({Role.HEAD})
    orders = [Assignment(number, roles, roles - kept, "", 0, personal=kept) for number in (0, 1)]
    start = {s.name: np.full(s.shape, 0.01, np.float32) for s in tiny_model.schema.select(roles - kept).tensors}
    steps: list[int] = []

    def check_cancelled() -> None:
        steps.append(len(steps))
        if len(steps) == spec.train.steps:
            raise RoundCancelled

    def trainer(ledger: Ledger) -> Trainer:
        return Trainer(tiny_model, rows, spec, policy, ledger, entropy_for=lambda round: Seeded(5, round, 1))

    with Ledger(tmp_path / "stopped", "ab") as ledger, Ledger(tmp_path / "fresh", "ab") as other:
        stopped = trainer(ledger)
        with pytest.raises(RoundCancelled):
            stopped.train("run", orders[0], start, check_cancelled)
        first = [(charge.round, charge.digest) for charge in ledger.charges()]
        after, alone = (each.train("run", orders[1], start).delta for each in (stopped, trainer(other)))

    assert len(steps) == spec.train.steps > 1, "it stopped before its last step"
    assert first == ([(0, None)] if private else [])
    assert after.keys() == alone.keys()
    for name, value in after.items():
        assert value.any()
        np.testing.assert_array_equal(value, alone[name])
