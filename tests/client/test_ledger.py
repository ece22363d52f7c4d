import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedloom.client.privacy.ledger import Ledger, stored_accounts
from fedloom.proto.accounting import Spend, epsilon
from fedloom.proto.errors import BudgetError, LedgerError

DATASET = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
SPEND = Spend(0.05, 1.0, 20)
DELTA = 1e-5

# Forks a client for every line it reads; loading the accountant once keeps the kills below quick. The client
# trains without end: it charges and releases, and prints each step once it is durable.
CLIENTS = """
import os, sys
from pathlib import Path
from fedloom.client.privacy.ledger import Ledger
from fedloom.proto.accounting import Spend, epsilon

spend = Spend(1.0, 100.0, 1)
epsilon([spend], 1e-5)

def train():
    with Ledger(Path(sys.argv[1]), sys.argv[2]) as ledger:
        print("open", os.getpid(), flush=True)
        for round in range(10**6):
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
    assert stored_accounts(tmp_path) == [DATASET]


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
        "import sys, pathlib, fedloom.client.privacy.ledger as l; l.Ledger(pathlib.Path(sys.argv[1]), sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def opened(dataset: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", opening, str(tmp_path), dataset]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = opened(DATASET)
    assert refused.returncode != 0
    assert "is in use by another client; only one may train on a data set" in refused.stderr
    assert opened(OTHER).returncode == 0


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


def account(folder: Path) -> Path:
    """A closed account with charges, one file."""
    with Ledger(folder, DATASET) as ledger:
        for round in range(3):
            reserve(ledger, round)
        return ledger.path


def test_another_data_sets_file_is_refused(tmp_path: Path) -> None:
    path = account(tmp_path / "mine")
    with Ledger(tmp_path / "other", OTHER) as ledger:
        target = ledger.path
    target.write_bytes(path.read_bytes())

    with pytest.raises(LedgerError, match=f"is the account of data set {DATASET}, not of {OTHER}"):
        Ledger(tmp_path / "other", OTHER)


@pytest.mark.parametrize("start", [0, 4096], ids=["header", "pages"])
def test_a_damaged_file_is_refused(tmp_path: Path, start: int) -> None:
    path = account(tmp_path)
    content = bytearray(path.read_bytes())
    content[start : start + 1000] = b"\xa5" * 1000
    path.write_bytes(content)

    with pytest.raises(LedgerError, match="restore it"):
        Ledger(tmp_path, DATASET)
    with pytest.raises(LedgerError, match="restore it"):  # and the refusal left no lock behind
        Ledger(tmp_path, DATASET)


def test_a_shortened_file_is_refused(tmp_path: Path) -> None:
    path = account(tmp_path)
    path.write_bytes(path.read_bytes()[:6000])

    with pytest.raises(LedgerError, match="restore it"):
        Ledger(tmp_path, DATASET)


@pytest.mark.parametrize(
    "edit", ["UPDATE charge SET steps = 0", "UPDATE charge SET sampling_rate = 2.0", "DELETE FROM dataset"]
)
def test_entries_no_client_wrote_are_refused(tmp_path: Path, edit: str) -> None:
    path = account(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute(edit)
    db.close()

    with pytest.raises(LedgerError, match="restore it"):
        Ledger(tmp_path, DATASET)


def test_the_file_is_named_by_the_data_set_and_private_to_its_folder(tmp_path: Path) -> None:
    with Ledger(tmp_path / "deep" / "state", DATASET) as ledger:
        assert ledger.path == tmp_path / "deep" / "state" / ("ab" * 16 + ".ledger")


def test_stored_accounts_names_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.ledger").write_text(json.dumps({}))

    with pytest.raises(LedgerError, match=r"x\.ledger cannot be read as a ledger"):
        stored_accounts(tmp_path)
