"""A client that dies at some point of a round and is started again: the same bytes, or a new charge, never neither."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session import participant as module
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.errors import FedloomError, LedgerError, PolicyError, ProtocolError, Unavailable, UpdateRejected
from fedloom.core.privacy.accounting import Spend
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.proto.messages import Answer, Assignment, Finished, Joined, RoundStatus, UpdateHeader, upload_schema

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)),))
PAYLOAD = codec("fp32").encode(SCHEMA, SCHEMA.zeros())
FINISHED = Finished(9, "fp32", "0" * 64, 0)
ROLES = frozenset({Role.LORA_A})


class Kill(BaseException):
    """The process is gone."""


def order(round: int) -> Assignment:
    return Assignment(round, ROLES, ROLES, hashlib.sha256(PAYLOAD).hexdigest(), len(PAYLOAD))


@dataclass
class Line:
    """A coordinator that answers from lists and keeps what arrives."""

    spec: Spec
    answers: list[Answer]
    failures: list[BaseException | None] = field(default_factory=list)
    sent: list[tuple[int, bytes]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def join(self, client: str, declared_examples: int) -> Joined:
        return Joined("run-1", 1, self.spec, SCHEMA)

    def work(self, held: str = "") -> Answer:
        return self.answers.pop(0)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        return PAYLOAD

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        self.sent.append((header.round, payload))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        return False

    def exchange(self, message: object) -> None:
        raise AssertionError("no secure sum here")

    def heartbeat(self) -> RoundStatus:
        return RoundStatus(0, True, 0)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        self.reasons.append(reason)


class Noisy:
    """Draws new noise whenever it is asked, under a new charge."""

    declared_examples = 0
    schema = SCHEMA

    def __init__(self, ledger: Ledger | None) -> None:
        self.ledger = ledger
        self.trained = 0

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        charge = None
        if self.ledger is not None:
            charge = self.ledger.reserve(run, assignment.round, Spend(0.1, 1.0, 1), budget=50, delta=1e-5)
        self.trained += 1
        noise = np.frombuffer(os.urandom(16), np.uint16).astype(np.float32).reshape(1, 8)
        return Trained({spec.name: noise for spec in upload_schema(SCHEMA, assignment).tensors}, charge)

    def release(self, charge: int | None, digest: str) -> None:
        if charge is not None:
            assert self.ledger is not None
            self.ledger.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.ledger is not None and self.ledger.drop(why)


@pytest.fixture
def line(spec: Spec) -> Line:
    return Line(spec, [order(0), order(1), FINISHED])


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "ab") as opened:
        yield opened


def started(line: Line, policy: Policy, trainer: Noisy, tmp_path: Path) -> Participant:
    timing = Timing(backoff_s=(0.0, 0.0))
    return Participant(line, policy, lambda _: trainer, outbox=tmp_path / "outbox", timing=timing)


def waiting(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "outbox").glob("*"))


@pytest.mark.parametrize("private", [True, False])
def test_an_update_that_may_have_left_is_sent_again_as_it_was(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path, private: bool
) -> None:
    trainer = Noisy(ledger if private else None)
    line.failures = [Kill()]
    with pytest.raises(Kill):
        started(line, policy, trainer, tmp_path).run()

    again = started(line, policy, trainer, tmp_path)
    assert again.run() == FINISHED

    assert [round for round, _ in line.sent] == [0, 0, 1]
    assert line.sent[0] == line.sent[1]
    assert (trainer.trained, again.rounds_trained) == (2, 2)
    assert len(ledger.charges()) == (2 if private else 0)
    assert waiting(tmp_path) == []


def test_the_bytes_are_on_disk_before_the_ledger_says_that_they_leave(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a kill between the two leaves bytes that can be sent, rather than a round that cannot be answered."""
    trainer = Noisy(ledger)
    seen: list[str] = []

    def release(charge: int | None, digest: str) -> None:
        seen.extend(hashlib.sha256(path.read_bytes().split(b"\n", 3)[3]).hexdigest() for path in waiting(tmp_path))
        assert seen == [digest]
        raise Kill

    monkeypatch.setattr(trainer, "release", release)
    with pytest.raises(Kill):
        started(line, policy, trainer, tmp_path).run()
    monkeypatch.undo()
    assert line.sent == []

    started(line, policy, trainer, tmp_path).run()

    assert hashlib.sha256(line.sent[0][1]).hexdigest() == seen[0] == ledger.charges()[0].digest
    assert len(ledger.charges()) == 2


def test_what_was_reserved_and_not_finished_is_computed_under_a_new_charge(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Noisy(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", lambda *_: (_ for _ in ()).throw(Kill))
        with pytest.raises(Kill):
            started(line, policy, trainer, tmp_path).run()
    line.answers.insert(0, order(0))

    started(line, policy, trainer, tmp_path).run()

    assert [(charge.round, charge.digest is None) for charge in ledger.charges()] == [
        (0, True),
        (0, False),
        (1, False),
    ]
    assert [round for round, _ in line.sent] == [0, 1]


def test_a_damaged_update_is_never_sent_and_its_round_never_computed_again(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path
) -> None:
    trainer = Noisy(ledger)
    line.failures = [Kill()]
    with pytest.raises(Kill):
        started(line, policy, trainer, tmp_path).run()
    (path,) = waiting(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(LedgerError, match="is damaged"):
        started(line, policy, trainer, tmp_path).run()
    path.unlink()  # as the error says
    line.answers.insert(0, order(0))
    with pytest.raises(PolicyError, match="round 1 of run 'run-1' was answered before"):
        started(line, policy, trainer, tmp_path).run()

    assert line.reasons == ["refused", "refused"]
    assert len(line.sent) == len(ledger.charges()) == trainer.trained == 1


def test_an_update_that_is_not_the_ledgers_is_not_sent(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path
) -> None:
    line.failures = [Kill()]
    with pytest.raises(Kill):
        started(line, policy, Noisy(ledger), tmp_path).run()

    with (
        Ledger(tmp_path / "another", "cd") as other,
        pytest.raises(LedgerError, match=r"charge 2 .*unknown.*round 1 in .*outbox is not sent"),
    ):
        started(line, policy, Noisy(other), tmp_path).run()

    assert len(line.sent) == 1


def test_a_round_that_is_opened_again_is_answered_with_the_same_bytes(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path
) -> None:
    late: list[BaseException | None] = [ProtocolError("round 0 is next and not open")] * 2  # also after joining anew
    line.failures = list(late)
    line.answers = [order(0), order(0), order(1), FINISHED]

    started(line, policy, Noisy(ledger), tmp_path).run()

    assert [round for round, _ in line.sent] == [0, 0, 0, 1]
    assert len({payload for round, payload in line.sent if round == 0}) == 1
    assert [charge.round for charge in ledger.charges()] == [0, 1]


def test_a_round_that_is_refused_again_and_again_ends_the_clients_part(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path
) -> None:
    line.failures = [ProtocolError("no")] * 100
    line.answers = [order(0)] * 100

    with pytest.raises(PolicyError, match="asks for round 1 again and has refused its update 3 times"):
        started(line, policy, Noisy(ledger), tmp_path).run()

    assert len(line.sent) == 6
    assert len(set(line.sent)) == len(ledger.charges()) == 1
    assert line.reasons == ["refused"]


@pytest.mark.parametrize("failure", [None, UpdateRejected("NaN")], ids=["taken", "rejected"])
def test_an_update_that_is_settled_is_removed_at_once(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path, failure: FedloomError | None
) -> None:
    line.failures = [failure]
    participant = started(line, policy, Noisy(ledger), tmp_path)
    participant.join()
    participant.step()

    assert waiting(tmp_path) == []


def test_an_update_without_an_answer_stays_until_there_is_one(
    line: Line, policy: Policy, ledger: Ledger, tmp_path: Path
) -> None:
    line.failures = [Unavailable("lost")]
    participant = started(line, policy, Noisy(ledger), tmp_path)
    participant.join()
    with pytest.raises(Unavailable):
        participant.step()
    assert len(waiting(tmp_path)) == 1

    participant.step()
    assert waiting(tmp_path) == []


def test_the_end_of_the_run_empties_the_spool(line: Line, policy: Policy, ledger: Ledger, tmp_path: Path) -> None:
    line.failures = [ProtocolError("late")] * 2
    line.answers = [order(0), FINISHED]

    started(line, policy, Noisy(ledger), tmp_path).run()

    assert waiting(tmp_path) == []
