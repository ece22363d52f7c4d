"""The file of a ledger: its lock, its settings and its entries."""

import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from fedloom.client.privacy.ledger.hash_chain import Entry
from fedloom.core.errors import LedgerError
from fedloom.core.runtime.failpoints import reach

__all__ = ["REMEDY", "InUse", "add", "connect", "file_name", "held", "read_entries", "remedy", "stored_accounts"]

_SCHEMA = """
CREATE TABLE entry (
    number INTEGER PRIMARY KEY, written REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL
) STRICT
"""

REMEDY = (
    "Put back the newest ledger and anchor; if there are none, or this was done on purpose, "
    "`fedloom ledger recover` says so and goes on"
)
"""What to do about a ledger that is not trusted."""

_ROOM = "Free the disk, see that this user may write there, and start again; the ledger itself is not in doubt"
_DISK = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN})
"""SQLite's codes for a disk that does not take or give what it is asked, which say nothing of what lies on it."""


def remedy(error: Exception) -> str:
    """What to do about a ledger that could not be opened for this reason.

    >>> remedy(OSError(28, "No space left on device")).split(",")[0]
    'Free the disk'
    """
    refused = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK
    return _ROOM if refused or isinstance(error, OSError) else REMEDY


class InUse(LedgerError):
    """Another process has the account open."""


def held(path: Path) -> int:
    """Lock the ledger `path` for this process; returns the descriptor whose closing unlocks it.

    Raises:
        InUse: Another process has it.
        LedgerError: Its folder cannot be written.
    """
    try:
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LedgerError(f"{path} cannot be locked: {error}; make its folder writable") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InUse(f"{path} is in use by another client; only one may train on a data set") from None
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
        raise LedgerError(f"{path} cannot be opened as a ledger: {error}. {remedy(error)}") from error
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
