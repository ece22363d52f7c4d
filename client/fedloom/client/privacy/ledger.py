"""The durable privacy account of a data set, kept by the client that owns it.

A state folder holds one account: whatever run, coordinator or adapter its data is used for, and however the data
grows, it is charged here. A charge is written and synced before any noisy result exists, so a crash at any moment
can only over-count.

The account is one SQLite file of entries that are only ever added, each bound to the one before it by a hash, and
an anchor outside that file; `anchor` says what the two detect, and what no machine can detect alone.
"""

import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fedloom.client.privacy.anchor import Anchor, anchor_path, anchors_at, place_of, read_anchor, troubles
from fedloom.client.privacy.chain import (
    CHARGED,
    OPENED,
    RELEASED,
    Charge,
    Entry,
    account_of,
    charge_content,
    linked,
    note,
    totals,
)
from fedloom.proto.accounting import GRID, REPORT_GRID, Spend, Statement, epsilon, statement
from fedloom.proto.durable import make_folder, sync_folder
from fedloom.proto.errors import BudgetError, LedgerError, PolicyError
from fedloom.proto.failpoints import failpoint, reach

__all__ = ["REMEDY", "Ledger", "add", "connect", "file_name", "held", "read_entries", "stored_accounts"]

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE entry (
    number INTEGER PRIMARY KEY, written REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL
) STRICT
"""

REMEDY = (
    "Put back the newest ledger and anchor; if there are none, or this was done on purpose, "
    "`fedloom ledger adopt` says so and goes on"
)
"""What to do about a ledger that is not trusted."""


class Ledger:
    """The account of one data set.

    Use as a context manager. While it is open no other process can open the same account.
    """

    def __init__(self, folder: Path, name: str, *, anchors: Path | None = None) -> None:
        """Open the account `name` in `folder`, or create it if the folder has none.

        Args:
            folder: Where the ledger lies.
            name: The account's name, as `stored_accounts` gives it or, for a new one, the data set's digest.
            anchors: Where the anchor lies. None keeps it in `folder`, from where it witnesses against changes of
                the ledger alone, but not of the whole folder.

        Raises:
            LedgerError: Another process has it open, it is not known to be the newest state of this account, or
                the folder holds another one.
        """
        self.path = folder / file_name(name)
        self._anchors = folder if anchors is None else anchors
        try:
            make_folder(folder)
            make_folder(self._anchors)
        except OSError as error:
            raise LedgerError(f"ledger and anchor need the folders {folder} and {self._anchors}: {error}") from error
        self._lock = held(self.path)
        self._broken = False
        try:
            self._check_alone()
            if not self.path.exists():
                self._check_not_lost()
            self._db = connect(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _check_alone(self) -> None:
        others = [other for other in stored_accounts(self.path.parent) if other != self.path.stem]
        if others:
            raise LedgerError(
                f"{self.path.parent} holds the account {others[0]}, not {self.path.stem}; all data of one state "
                "folder is charged to one account. For other people's data set client.state to another folder"
            )

    def _check_not_lost(self) -> None:
        """Refuse to begin where an anchor says that there was a ledger."""
        for anchor in anchors_at(self._anchors, self.path.parent):
            raise LedgerError(
                f"the ledger {anchor.name} of {self.path.parent}, of {anchor.sequence} entries, is gone or empty; its "
                f"anchor {anchor_path(self._anchors, anchor.account)} remains. {REMEDY}"
            )

    @failpoint("ledger.open")
    def _load(self) -> None:
        """Read the account and make sure that it is the newest state of it, or begin one."""
        self._entries: list[Entry] = []
        self._charges: dict[int, Charge] = {}
        try:
            entries, self._place = read_entries(self._db), place_of(self.path)
            if entries:
                self._continue(entries)
            else:
                self._begin()
        except (OSError, sqlite3.Error, LedgerError) as error:
            raise LedgerError(f"{self.path} cannot be trusted: {error}. {REMEDY}") from error

    def _continue(self, entries: list[Entry]) -> None:
        name, self.account = account_of(entries)
        if name != self.path.stem:
            raise LedgerError(f"it is the account {name}")
        anchor = read_anchor(anchor_path(self._anchors, self.account))
        wrong = troubles(entries, anchor, self._place)
        if wrong:
            raise LedgerError("; ".join(wrong))
        for entry in entries:
            self._note(entry)
        if anchor is None or anchor.sequence < len(entries):
            log.info("%s: the anchor was one entry behind, as a crash leaves it", self.path)
            self._anchor()

    def _begin(self) -> None:
        self._check_not_lost()
        self.account = secrets.token_hex(16)
        first = linked(None, OPENED, {"name": self.path.stem, "account": self.account}, time.time())
        add(self._db, [first])
        sync_folder(self.path.parent)
        self._note(first)
        self._anchor()

    @property
    def sequence(self) -> int:
        """Number of entries."""
        return len(self._entries)

    @property
    def head(self) -> str:
        """Hash of the last entry: who has seen it can tell later whether this history was rewritten."""
        return self._entries[-1].hash

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry, oldest first."""
        return tuple(self._entries)

    def charges(self) -> list[Charge]:
        """Every charge, oldest first."""
        return list(self._charges.values())

    def spends(self) -> list[Spend]:
        """All that was charged, oldest first."""
        return [spend for charge in self.charges() for spend in charge.spends]

    def epsilon(self, delta: float, grid: float = GRID) -> float:
        """Epsilon spent over the whole life of the data set: everything reserved, released or not."""
        return epsilon(self.spends(), delta, grid)

    def statement(self, delta: float, grid: float = REPORT_GRID, *, covers: str = "the life of this data") -> Statement:
        """The terms and the epsilon of all that was charged.

        Raises:
            ConfigError: There is no finite epsilon at this delta.
        """
        return statement(self.spends(), delta, grid, covers=covers, rounds=len(self._charges))

    @failpoint("ledger.reserve")
    def reserve(
        self, run: str, round: int, spend: Spend, *, budget: float, delta: float, evaluation: Spend | None = None
    ) -> int:
        """Charge a round's training, and its evaluation if it has one, before the work starts; durable on return.

        Returns:
            The charge's number, for `release`.

        Raises:
            BudgetError: The account would exceed `budget` at `delta`; nothing is charged.
            PolicyError: An update for this round has already been released; a second one would be another
                noisy look at the same data. Nothing is charged.
        """
        if self._released(run, round) is not None:
            raise PolicyError(
                f"round {round + 1} of run {run!r} was answered before, and that answer is not kept any more; "
                "no round is answered with two different updates. Start the client again once the round is over. If "
                "the coordinator was put back to an earlier state, it never is, and the run cannot go on: its operator "
                "ends it with `fedloom operate finish`, or begins a new run"
            )
        after = epsilon([*self.spends(), spend, *([] if evaluation is None else [evaluation])], delta)
        if after > budget:
            raise BudgetError(
                f"round {round + 1} of run {run!r} would bring epsilon to {after:.4f} at delta {delta:g}; the policy "
                f"allows {budget:g} over the life of this data set, and {self.epsilon(delta):.4f} is spent. "
                "Leave the run, or raise privacy.epsilon in the policy if you may"
            )
        return self.append(CHARGED, charge_content(run, round, spend, evaluation))

    def evaluated(self, run: str, round: int) -> bool:
        """Whether an evaluation was charged for this round, released or not: there is one at most."""
        return any(each.evaluation for each in self._charges.values() if (each.run, each.round) == (run, round))

    @failpoint("ledger.release")
    def release(self, number: int, digest: str) -> None:
        """Note what leaves the client for a charge; durable on return, and before the first byte is sent.

        Raises:
            LedgerError: There is no such charge, or something else was already released for it or its round.
        """
        charge = self._charges.get(number)
        released = None if charge is None else self._released(charge.run, charge.round)
        if charge is not None and charge.digest == digest:
            return
        if charge is None or released is not None:
            raise LedgerError(f"charge {number} of {self.path} is unknown or already released with other content")
        self.append(RELEASED, {"charge": number, "digest": digest})

    def _released(self, run: str, round: int) -> str | None:
        """Digest of the update that was released for this round, if any."""
        digests = [each.digest for each in self._charges.values() if (each.run, each.round) == (run, round)]
        return next((digest for digest in digests if digest is not None), None)

    def append(self, kind: str, content: Mapping[str, object]) -> int:
        """Add an entry; it and the anchor are durable on return.

        Returns:
            The entry's number.

        Raises:
            LedgerError: The disk refuses, now or before. Whether the entry is on disk is then unknown, so nothing
                may be sent, and only opening the ledger anew can tell.
        """
        if self._broken:
            raise LedgerError(f"{self.path} could not be written before; start the client anew")
        entry = linked(self._entries[-1], kind, content, time.time())
        self._broken = True  # until both writes are known to have succeeded, whatever stops them
        try:
            add(self._db, [entry])
            reach("ledger.added")
            self._note(entry)
            self._anchor()
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"{self.path} or its anchor cannot be written: {error}; free the disk and start the client anew"
            ) from error
        reach("ledger.appended")
        self._broken = False
        return entry.number

    def _note(self, entry: Entry) -> None:
        self._entries.append(entry)
        note(self._charges, entry)

    def _anchor(self) -> None:
        steps = totals(self._charges.values())
        Anchor(self.account, self.path.stem, self._place, self.sequence, self.head, steps).write(self._anchors)

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


def held(path: Path) -> int:
    """Lock the ledger `path` for this process; returns the descriptor whose closing unlocks it.

    Raises:
        LedgerError: Another process has it, or its folder cannot be written.
    """
    try:
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LedgerError(f"{path} cannot be locked: {error}; make its folder writable") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise LedgerError(f"{path} is in use by another client; only one may train on a data set") from None
    return lock


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger file such that a commit that returns is on disk.

    Raises:
        LedgerError: It is no sound database, or the file system does not allow that.
    """
    db = None
    try:
        # Training runs in one thread and displays read from another; the lock keeps other processes out.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL").fetchone()
        db.execute("PRAGMA synchronous=FULL")
        # A setting that was not taken says so only when it is read back.
        found = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
        if found != ("wal", 2):
            raise LedgerError(f"journal mode and synchronisation are {found}, not ('wal', 2); move it to a local disk")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise LedgerError("its pages are damaged")
    except (sqlite3.Error, LedgerError) as error:
        if db is not None:
            db.close()
        raise LedgerError(f"{path} cannot be opened as a ledger: {error}. {REMEDY}") from error
    return db


def read_entries(db: sqlite3.Connection) -> list[Entry]:
    """Every entry, oldest first; none for a file that has just been made.

    Raises:
        LedgerError: The file is no ledger of this version, or has lost its entries.
    """
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    if not tables:
        return []
    if tables != {"entry"}:
        raise LedgerError(f"it has the tables {', '.join(sorted(tables))} instead of entry: no ledger of this version")
    entries = [Entry(*row) for row in db.execute("SELECT number, written, kind, body, hash FROM entry ORDER BY number")]
    if not entries:
        raise LedgerError("all its entries are gone")
    return entries


def add(db: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    """Write entries at the end of the ledger, all or none; durable on return.

    Raises:
        sqlite3.Error: The disk refuses; whether they are on disk is then unknown.
    """
    db.execute("BEGIN IMMEDIATE")
    if entries[0].number == 1:
        db.execute(_SCHEMA)
    db.executemany(
        "INSERT INTO entry VALUES (?, ?, ?, ?, ?)", [(e.number, e.written, e.kind, e.body, e.hash) for e in entries]
    )
    reach("ledger.add.begun")
    db.execute("COMMIT")


def file_name(name: str) -> str:
    """Name of the file of the account `name`.

    >>> file_name("sha256:" + "ab" * 32) == "ab" * 16 + ".ledger"
    True
    """
    return f"{name.removeprefix('sha256:')[:32]}.ledger"


def stored_accounts(folder: Path) -> list[str]:
    """Names of the accounts that have a ledger in `folder`, readable or not."""
    return sorted(path.stem for path in folder.glob("*.ledger"))
