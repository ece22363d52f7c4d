"""The durable privacy account of one data set, kept by the client that owns it.

One SQLite file per data set, named by the data set's digest: whatever run, coordinator or adapter the data
is used for, it is charged here. A charge is written and synced before any noisy result exists, so a crash
at any moment can only over-count.
"""

import fcntl
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedloom.proto.accounting import Spend, epsilon
from fedloom.proto.errors import BudgetError, ConfigError, LedgerError

__all__ = ["Charge", "Ledger", "stored_accounts"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS dataset (digest TEXT PRIMARY KEY, created REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS charge (
    number INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    sampling_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    steps INTEGER NOT NULL,
    reserved REAL NOT NULL,
    released REAL,
    digest TEXT
) STRICT;
"""


@dataclass(frozen=True)
class Charge:
    """One entry: the steps reserved for a round, and the digest of what was released for them, if anything."""

    number: int
    run: str
    round: int
    spend: Spend
    digest: str | None


class Ledger:
    """The account of one data set.

    Use as a context manager. While it is open no other process can open the same account.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        """Open or create the account of the data set with digest `dataset` in `folder`.

        Raises:
            LedgerError: Another process has it open, or the file is not this data set's sound account.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{dataset.removeprefix('sha256:')[:32]}.ledger"
        self._lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LedgerError(f"{self.path} is in use by another client; only one may train on a data set") from None
        try:
            self._db = self._open(dataset)
            self.charges()
        except sqlite3.Error as error:
            os.close(self._lock)
            raise LedgerError(
                f"{self.path} cannot be opened as a ledger: {error}; restore it or ask who owns it"
            ) from error
        except LedgerError:
            os.close(self._lock)
            raise

    def _open(self, dataset: str) -> sqlite3.Connection:
        # Training runs in one thread and displays read from another; the lock above keeps other processes out.
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise LedgerError(f"{self.path} is on a file system without write-ahead logging (mode {mode}); move it")
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_SCHEMA)
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise LedgerError(f"{self.path} is damaged; restore it from a backup that is not older than its last run")
        rows = db.execute("SELECT digest FROM dataset").fetchall()
        (charges,) = db.execute("SELECT count(*) FROM charge").fetchone()
        if not rows and charges:
            raise LedgerError(f"{self.path} has charges but names no data set; restore it from a backup")
        if not rows:
            db.execute("INSERT INTO dataset VALUES (?, ?)", (dataset, time.time()))
            _sync_folder(self.path.parent)
        elif rows != [(dataset,)]:
            raise LedgerError(f"{self.path} is the account of data set {rows[0][0]}, not of {dataset}")
        return db

    def charges(self) -> list[Charge]:
        """Every charge, oldest first.

        Raises:
            LedgerError: An entry is none that a client writes.
        """
        rows = self._db.execute(
            "SELECT number, run, round, sampling_rate, noise_multiplier, steps, digest FROM charge ORDER BY number"
        )
        try:
            return [Charge(n, run, rnd, Spend(q, sigma, steps), sent) for n, run, rnd, q, sigma, steps, sent in rows]
        except ConfigError as error:
            raise LedgerError(
                f"{self.path} holds an entry no client writes: {error}; restore it from a backup"
            ) from error

    def epsilon(self, delta: float) -> float:
        """Epsilon spent over the whole life of the data set: everything reserved, released or not."""
        return epsilon([charge.spend for charge in self.charges()], delta)

    def reserve(self, run: str, round: int, spend: Spend, *, budget: float, delta: float) -> int:
        """Charge `spend` before the work starts; durable on return.

        Returns:
            The charge's number, for `release`.

        Raises:
            BudgetError: The account would exceed `budget` at `delta`; nothing is charged.
        """
        after = epsilon([*(charge.spend for charge in self.charges()), spend], delta)
        if after > budget:
            raise BudgetError(
                f"round {round + 1} of run {run!r} would bring epsilon to {after:.4f} at delta {delta:g}; the policy "
                f"allows {budget:g} over the life of this data set, and {self.epsilon(delta):.4f} is spent. "
                "Leave the run, or raise privacy.epsilon in the policy if you may"
            )
        cursor = self._write(
            "INSERT INTO charge (run, round, sampling_rate, noise_multiplier, steps, reserved) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (run, round, spend.sampling_rate, spend.noise_multiplier, spend.steps, time.time()),
        )
        assert cursor.lastrowid is not None  # an INSERT into a rowid table always has one
        return cursor.lastrowid

    def release(self, number: int, digest: str) -> None:
        """Note what leaves the client for a charge; durable on return, and before the first byte is sent.

        Raises:
            LedgerError: There is no such charge, or something else was already released for it.
        """
        changed = self._write(
            "UPDATE charge SET released = ?, digest = ? WHERE number = ? AND (digest IS NULL OR digest = ?)",
            (time.time(), digest, number, digest),
        ).rowcount
        if changed != 1:
            raise LedgerError(f"charge {number} of {self.path} is unknown or already released with other content")

    def _write(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        """One durable change.

        Raises:
            LedgerError: The disk refuses; whether the change is on disk is then unknown, so nothing may be sent.
        """
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise LedgerError(
                f"{self.path} cannot be written: {error}; free the disk and start the client anew"
            ) from error

    def close(self) -> None:
        """Release the file and its lock."""
        self._db.close()
        os.close(self._lock)

    def __enter__(self) -> "Ledger":
        """The open ledger."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def stored_accounts(folder: Path) -> list[str]:
    """Digests of the data sets that have an account in `folder`.

    Raises:
        LedgerError: A file there cannot be read as a ledger.
    """
    digests: list[str] = []
    for path in sorted(folder.glob("*.ledger")):
        try:
            db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            try:
                digests += [digest for (digest,) in db.execute("SELECT digest FROM dataset")]
            finally:
                db.close()
        except sqlite3.Error as error:
            raise LedgerError(f"{path} cannot be read as a ledger: {error}") from error
    return digests


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable: SQLite syncs the file, not the folder it was created in."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
