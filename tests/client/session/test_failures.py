"""Work that fails after it was charged: it ends for this client, durably, and never spends the budget in a loop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.hash_chain import FAILED, OVER
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.privacy.ledger.recover import recover
from fedloom.client.session import participant as module
from fedloom.client.session.api import CheckCancelled, RoundCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.core.config.run import Spec
from fedloom.core.errors import CodecError, LedgerError, ModelError, PolicyError
from fedloom.core.schema import Tensors
from fedloom.proto.messages import Assignment
from tests.client.session.test_resend import FINISHED, Kill, Line, Noisy, order

ACCOUNT = "ab"


class Failing(Noisy):
    """Is charged for its work, and then fails."""

    def __init__(self, ledger: Ledger, failures: list[BaseException | None]) -> None:
        super().__init__(ledger)
        self.failures = failures

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        done = super().train(run, assignment, broadcast, check_cancelled)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        return done


@pytest.fixture
def life(spec: Spec, policy: Policy, tmp_path: Path) -> Callable[..., Line]:
    """Lives of one client, each a process of its own: what it is asked, and what goes wrong."""

    def live(rounds: list[int], *failures: BaseException | None) -> Line:
        long = spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": 9})})
        line = Line(long, [*map(order, rounds), FINISHED])
        with Ledger(tmp_path / "ledger", ACCOUNT, anchors=tmp_path / "anchors") as ledger:
            Lives.line = line
            trainer, timing = Failing(ledger, list(failures)), Timing(backoff_s=(0.0, 0.0))
            Participant(line, policy, lambda _: trainer, outbox=tmp_path / "outbox", timing=timing).run()
        return line

    return live


class Lives:
    """The line of the last life, also of one that ended in an error."""

    line: Line


def charged(tmp_path: Path) -> list[tuple[int, str | None, bool]]:
    with Ledger(tmp_path / "ledger", ACCOUNT, anchors=tmp_path / "anchors") as ledger:
        return [(each.round, each.dropped, each.digest is not None) for each in ledger.charges()]


@pytest.mark.parametrize("error", [CodecError("NaN"), ModelError("no memory"), RuntimeError("device"), MemoryError()])
def test_a_round_that_fails_after_its_charge_is_left_and_never_charged_again(
    life: Callable[..., Line], tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)):
        life([0], error)
    assert Lives.line.reasons == ["refused"]

    for _ in range(4):  # whoever starts it again and again
        with pytest.raises(PolicyError, match="round 1 of run 'run-1' has failed here after it was charged"):
            life([0])
        assert Lives.line.reasons == ["refused"]
    assert charged(tmp_path) == [(0, FAILED, False)]

    assert [round for round, _ in life([1]).sent] == [1]
    assert charged(tmp_path) == [(0, FAILED, False), (1, None, True)]


@pytest.mark.parametrize("death", [RuntimeError("device"), Kill()], ids=["failed", "killed"])
def test_rounds_that_come_to_nothing_one_after_the_other_end_the_clients_part(
    life: Callable[..., Line], tmp_path: Path, death: BaseException
) -> None:
    for round in range(3):
        with pytest.raises(type(death)):
            life([round if isinstance(death, Exception) else 0], death)

    for _ in range(2):
        with pytest.raises(PolicyError, match="the last 3 charges for run 'run-1' came to nothing"):
            life([3])
        assert Lives.line.reasons == ["refused"]
    assert len(charged(tmp_path)) == 3

    recover(tmp_path / "ledger", tmp_path / "anchors", reason="more memory", spent=None)
    assert [round for round, _ in life([3]).sent] == [3]


def test_failures_between_answered_rounds_do_not_add_up(life: Callable[..., Line], tmp_path: Path) -> None:
    for round in range(0, 8, 2):
        with pytest.raises(RuntimeError):
            life([round, round + 1], None, RuntimeError("device"))

    assert [dropped for _, dropped, _ in charged(tmp_path)] == [None, FAILED] * 4


def test_a_round_that_closed_without_this_client_is_no_failure(life: Callable[..., Line], tmp_path: Path) -> None:
    line = life([0, 1, 2, 3, 0], *(RoundCancelled("late") for _ in range(4)))

    assert [round for round, _ in line.sent] == [0]  # opened again under its number
    assert charged(tmp_path) == [*((round, OVER, False) for round in range(4)), (0, None, True)]


@pytest.mark.parametrize("full", [OSError(28, "No space left on device"), LedgerError("free the disk")])
def test_a_round_that_met_a_full_disk_is_done_once_the_disk_is_freed(
    life: Callable[..., Line], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(type(full)):
            life([0])
    assert Lives.line.reasons == ["refused"]

    assert [round for round, _ in life([0]).sent] == [0]
    assert charged(tmp_path) == [(0, None, False), (0, None, True)]


def test_an_account_that_nothing_stops_needs_no_adoption(life: Callable[..., Line], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        life([0], RuntimeError("device"))

    with pytest.raises(LedgerError, match="there is nothing to recover"):
        recover(tmp_path / "ledger", tmp_path / "anchors", reason="no need", spent=None)
