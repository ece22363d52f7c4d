import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.client.privacy.ledger import file as file_module
from fedloom.client.privacy.ledger import ledger as module
from fedloom.client.privacy.ledger.anchor import Anchor
from fedloom.client.privacy.ledger.file import stored_accounts
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.errors import BudgetError, LedgerError, PolicyError
from fedloom.core.privacy.accounting import Spend, epsilon

DATASET = "sha256:" + "ab" * 32
SPEND = Spend(0.05, 1.0, 20)
DELTA = 1e-5

# Forks a client for every line it reads; loading the accountant once keeps the kills below quick. The client
# trains without end: it charges and releases, and prints each step once it is durable.
CLIENTS = """
import os, sys
from pathlib import Path
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.privacy.accounting import Spend, epsilon

spend = Spend(1.0, 100.0, 1)
epsilon([spend], 1e-5)

def train():
    with Ledger(Path(sys.argv[1]), sys.argv[2]) as ledger:
        print("open", os.getpid(), flush=True)
        for round in range(ledger.sequence, 10**6):
            number = ledger.reserve("endless", round, spend, budget=1e6, delta=1e-5)
            print("reserved", number, flush=True)
            ledger.release(number, f"digest-{number}")
            print("released", number, flush=True)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        train()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path, DATASET) as opened:
        yield opened


def reserve(ledger: Ledger, round: int = 0, *, budget: float = 50.0) -> int:
    return ledger.reserve("run", round, SPEND, budget=budget, delta=DELTA)


def test_charges_survive_reopening(tmp_path: Path) -> None:
    with Ledger(tmp_path, DATASET) as ledger:
        first, second = reserve(ledger, 0), reserve(ledger, 1)
        ledger.release(first, "sent")
        spent = ledger.epsilon(DELTA)

    with Ledger(tmp_path, DATASET) as again:
        assert [(c.number, c.run, c.round, c.spend, c.digest) for c in again.charges()] == [
            (first, "run", 0, SPEND, "sent"),
            (second, "run", 1, SPEND, None),
        ]
        assert again.epsilon(DELTA) == spent == epsilon([SPEND, SPEND], DELTA)
    assert stored_accounts(tmp_path) == ["ab" * 16]


def test_a_new_account_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.charges() == []
    assert ledger.epsilon(DELTA) == 0.0


def test_reserve_refuses_beyond_the_budget_and_charges_nothing(ledger: Ledger) -> None:
    budget = epsilon([SPEND, SPEND], DELTA)
    reserve(ledger, 0, budget=budget)
    reserve(ledger, 1, budget=budget)
    before = ledger.charges()

    with pytest.raises(BudgetError, match=r"round 3 of run 'run' would bring epsilon to .* the policy allows"):
        reserve(ledger, 2, budget=budget)

    assert ledger.charges() == before
    assert ledger.epsilon(DELTA) == budget


def test_runs_share_one_account(ledger: Ledger) -> None:
    budget = epsilon([SPEND], DELTA)
    ledger.reserve("first", 0, SPEND, budget=budget, delta=DELTA)

    with pytest.raises(BudgetError, match="run 'second'"):
        ledger.reserve("second", 0, Spend(0.001, 10.0, 1000), budget=budget, delta=DELTA)


def test_a_repeated_round_is_charged_again(ledger: Ledger) -> None:
    reserve(ledger, 0)
    reserve(ledger, 0)

    assert ledger.epsilon(DELTA) == epsilon([SPEND, SPEND], DELTA)


def test_a_round_that_was_answered_is_not_charged_or_answered_again(ledger: Ledger) -> None:
    first, second = reserve(ledger, 0), reserve(ledger, 0)
    ledger.release(first, "sent")
    before = ledger.charges()

    with pytest.raises(PolicyError, match="round 1 of run 'run' was answered before"):
        reserve(ledger, 0)
    with pytest.raises(LedgerError, match=f"charge {second} .*already released with other content"):
        ledger.release(second, "another")

    assert ledger.charges() == before
    assert ledger.reserve("other run", 0, SPEND, budget=50, delta=DELTA) > second


def test_release_is_repeatable_with_the_same_content_only(ledger: Ledger) -> None:
    number = reserve(ledger)
    ledger.release(number, "first")
    ledger.release(number, "first")

    with pytest.raises(LedgerError, match=f"charge {number} .*already released with other content"):
        ledger.release(number, "second")
    with pytest.raises(LedgerError, match=r"charge 99 .*unknown"):
        ledger.release(99, "first")

    assert [charge.digest for charge in ledger.charges()] == ["first"]


def test_writes_are_logged_ahead_and_fully_synchronous(ledger: Ledger) -> None:
    (mode,) = ledger._db.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = ledger._db.execute("PRAGMA synchronous").fetchone()

    assert mode == "wal"
    assert synchronous == 2  # FULL: an fsync before each commit returns


@pytest.mark.parametrize(
    ("setting", "other"), [("journal_mode=WAL", "journal_mode=DELETE"), ("synchronous=FULL", "synchronous=NORMAL")]
)
def test_a_file_system_that_does_not_take_the_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, other: str
) -> None:
    class Stubborn(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace(setting, other), *values)

    monkeypatch.setattr(file_module, "sqlite3", SimpleNamespace(connect=stubborn(Stubborn), Error=sqlite3.Error))

    with pytest.raises(LedgerError, match=r"journal mode and synchronisation are .* move it to a local disk"):
        Ledger(tmp_path, DATASET)


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_is_no_reason_to_adopt_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    class Full(sqlite3.Connection):
        """SQLite's own word for a disk without room."""

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "journal_mode=" in sql:
                super().execute("PRAGMA max_page_count = 1")
                super().execute("CREATE TABLE no_room (x)")
            return super().execute(sql, *values)

    if begun:
        with Ledger(tmp_path, DATASET) as ledger:
            reserve(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(file_module, "sqlite3", SimpleNamespace(connect=stubborn(Full), Error=sqlite3.Error))
        with pytest.raises(LedgerError, match=r"disk is full\. Free the disk, .* and start again") as refused:
            Ledger(tmp_path, DATASET)
    assert "ledger recover" not in str(refused.value)

    with Ledger(tmp_path, DATASET) as again:
        assert len(again.charges()) == begun


def test_an_anchor_that_a_full_disk_did_not_take_is_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Anchor, "write", full)
        with pytest.raises(LedgerError, match="Free the disk") as refused:
            Ledger(tmp_path, DATASET)
    assert "ledger recover" not in str(refused.value)

    with Ledger(tmp_path, DATASET) as again:
        reserve(again)


def stubborn(kind: type[sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
    return lambda path, **options: sqlite3.connect(path, factory=kind, **options)


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [2e9, 1e9, 0.0, -5.0, 3e9]
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.pop(0)))
    with Ledger(tmp_path, DATASET) as ledger:
        ledger.release(reserve(ledger), "sent")
        reserve(ledger, 1)

    with Ledger(tmp_path, DATASET) as again:
        assert [(charge.round, charge.digest) for charge in again.charges()] == [(0, "sent"), (1, None)]
        assert again.epsilon(DELTA) == epsilon([SPEND, SPEND], DELTA)


@pytest.mark.parametrize("broken", ["add", "Anchor"])
def test_after_a_failed_write_nothing_is_charged_or_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Ledger(tmp_path, DATASET) as ledger:
        number = reserve(ledger)
        with monkeypatch.context() as disk:
            disk.setattr(module, broken, fails)
            with pytest.raises(LedgerError, match=r"cannot be written: .*No space left"):
                reserve(ledger, 1)
        with pytest.raises(LedgerError, match="could not be written before; start the client anew"):
            ledger.release(number, "sent")

    with Ledger(tmp_path, DATASET) as again:
        charged = [charge.round for charge in again.charges()]
        assert charged == ([0] if broken == "add" else [0, 1])  # a charge whose anchor failed counts


def test_no_transaction_is_left_open(ledger: Ledger) -> None:
    ledger.release(reserve(ledger), "sent")

    assert not ledger._db.in_transaction


@contextmanager
def clients(folder: Path, dataset: str = DATASET) -> Iterator[Callable[[int], list[str]]]:
    """Gives a function that starts a client, kills it after so many printed lines, and returns all it printed."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENTS, str(folder), dataset],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def line() -> str:
            text = stdout.readline()
            assert text.endswith("\n")
            return text

        def killed_after(count: int) -> list[str]:
            stdin.write("go\n")
            stdin.flush()
            lines = [line() for _ in range(count)]
            os.kill(int(lines[0].split()[1]), signal.SIGKILL)
            while not lines[-1].startswith("ended"):
                lines.append(line())
            assert lines[-1] == f"ended {-signal.SIGKILL}\n"
            return lines[:-1]

        try:
            yield killed_after
        finally:
            process.kill()


def numbers(lines: list[str], word: str) -> set[int]:
    return {int(line.split()[1]) for line in lines if line.startswith(word)}


def test_a_second_process_is_refused_while_the_account_is_open(tmp_path: Path, ledger: Ledger) -> None:
    opening = (
        "import sys, pathlib, fedloom.client.privacy.ledger.ledger as l;"
        "l.Ledger(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    command = [sys.executable, "-c", opening, str(tmp_path), DATASET]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert refused.returncode != 0
    assert "is in use by another client; only one may train on a data set" in refused.stderr


# Opens, charges and releases as fast as it may; while it has the account, a file says so, which must not be there yet.
RIVAL = """
import os, sys
from pathlib import Path
from fedloom.client.privacy.ledger import ledger as module
from fedloom.core.privacy.accounting import Spend
from fedloom.core.errors import LedgerError

module.epsilon = lambda *_: 0.0
folder, name, attempts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
done = refused = 0
while done < attempts:
    try:
        ledger = module.Ledger(folder, "ab" * 16)
    except LedgerError as error:
        assert "in use by another client" in str(error), error
        refused += 1
        continue
    with ledger:
        os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
        number = ledger.reserve(name, done, Spend(0.5, 1.0, 1), budget=1.0, delta=1e-5)
        ledger.release(number, f"{name}-{done}")
        done += 1
        os.unlink(folder / "mine")
print(refused)
"""


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_two_processes_take_turns_and_lose_no_charge(tmp_path: Path) -> None:
    attempts = 1000 if os.environ.get("FEDLOOM_PROVE") else 60
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(tmp_path), name, str(attempts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in ("one", "two")
    ]
    ended = [rival.communicate() for rival in rivals]

    assert [rival.returncode for rival in rivals] == [0, 0], ended
    assert sum(int(refused) for refused, _ in ended) > 0
    with Ledger(tmp_path, DATASET) as ledger:
        released = sorted((charge.run, charge.round, charge.digest) for charge in ledger.charges())
    assert released == [(name, i, f"{name}-{i}") for name in ("one", "two") for i in range(attempts)]


def test_a_second_opening_in_the_same_process_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="in use"):
        Ledger(tmp_path, DATASET)


def test_kill_at_random_points_never_loses_a_charge(tmp_path: Path) -> None:
    rng = random.Random(0)
    reserved: set[int] = set()
    released: set[int] = set()

    with clients(tmp_path) as killed_after:
        for _ in range(25):
            lines = killed_after(rng.randrange(1, 12))
            reserved |= numbers(lines, "reserved")
            released |= numbers(lines, "released")

            with Ledger(tmp_path, DATASET) as ledger:
                charges = {charge.number: charge for charge in ledger.charges()}
                assert reserved <= charges.keys()
                assert released <= {n for n, charge in charges.items() if charge.digest == f"digest-{n}"}
                oracle = epsilon([Spend(1.0, 100.0, len(reserved))], DELTA) if reserved else 0.0
                assert ledger.epsilon(DELTA) >= oracle

    assert len(reserved) > 25


def test_the_file_is_named_by_the_data_set_and_private_to_its_folder(tmp_path: Path) -> None:
    with Ledger(tmp_path / "deep" / "state", DATASET) as ledger:
        assert ledger.path == tmp_path / "deep" / "state" / ("ab" * 16 + ".ledger")


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for folder, anchors in ((tmp_path / "file" / "ledger", None), (tmp_path / "ledger", tmp_path / "file")):
        with pytest.raises(LedgerError, match="ledger and anchor need the folders"):
            Ledger(folder, DATASET, anchors=anchors)
    (tmp_path / "ledger" / f"{'ab' * 16}.lock").mkdir()
    with pytest.raises(LedgerError, match="cannot be locked"):
        Ledger(tmp_path / "ledger", DATASET)
