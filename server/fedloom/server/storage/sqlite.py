"""The SQLite file of a state directory: its tables, its formats, and its two chained logs.

Format 0 had no chain and no audit log; it is taken over when a store opens it. A later format is refused.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from fedloom.core.errors import StoreError
from fedloom.server.rounds.state import Event, UpdateAccepted, event_from_json, event_to_json
from fedloom.server.storage.hash_chain import Mark, beginning, follow, link

__all__ = [
    "FORMAT",
    "LOGS",
    "Log",
    "append",
    "check_mark",
    "connect",
    "connect_readonly",
    "event_rows",
    "explained",
    "newest",
    "read_epoch",
    "read_events",
    "read_log",
    "transaction",
    "upgrade",
]

FORMAT = 1
"""Number of the format that this build writes, in the database's user_version."""

Log = Literal["events", "audit"]
LOGS: tuple[Log, ...] = get_args(Log)

_TABLES = (
    "CREATE TABLE IF NOT EXISTS opened (epoch INTEGER PRIMARY KEY AUTOINCREMENT)",
    """CREATE TABLE IF NOT EXISTS events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, update_round INTEGER, update_client TEXT, body TEXT NOT NULL
    )""",
    """CREATE UNIQUE INDEX IF NOT EXISTS one_update ON events (update_round, update_client)
        WHERE update_round IS NOT NULL""",
)
_CHAINED = (
    "ALTER TABLE events ADD COLUMN link TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE audit (seq INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL, link TEXT NOT NULL)",
)
_INSERT = {
    "events": "INSERT INTO events (update_round, update_client, body, link) VALUES (?, ?, ?, ?)",
    "audit": "INSERT INTO audit (body, link) VALUES (?, ?)",
}


def connect(path: Path, durable: bool) -> sqlite3.Connection:
    """The database in WAL mode; it may be new or of another format, see `upgrade`.

    The switch to WAL fails silently unless its answer is read.

    Raises:
        StoreError: It is damaged or does not take WAL mode.
        sqlite3.Error: The disk refuses.
    """
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(f"{path} stays in journal mode {mode!r}; put the state on a local disk that supports WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
        _check_sound(db, path)
    except BaseException:
        db.close()
        raise
    return db


def upgrade(db: sqlite3.Connection, path: Path) -> bool:
    """Bring a new or an older database to this format; whether anything was done. Call it in a transaction.

    Raises:
        StoreError: It is of a later format.
    """
    version = _version(db)
    if version > FORMAT:
        raise StoreError(f"{path} has format {version}, this build knows {FORMAT}; run the version that wrote it")
    if version == FORMAT:
        return False
    for statement in (*_TABLES, *_CHAINED):
        db.execute(statement)
    before = beginning("events")
    for number, body in db.execute("SELECT seq, body FROM events ORDER BY seq").fetchall():
        before = link(before, body)
        db.execute("UPDATE events SET link = ? WHERE seq = ?", (before, number))
    db.execute(f"PRAGMA user_version={FORMAT}")
    return True


def connect_readonly(path: Path, *, sound: bool = False) -> sqlite3.Connection:
    """The database to look at, also while a coordinator writes to it.

    Args:
        path: The database.
        sound: It was read before; a check of the whole file is left out.

    Raises:
        StoreError: There is none, or it is damaged or of another format.
        sqlite3.Error: The disk refuses.
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist; give the state directory of a run")
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        if not sound:
            _check_sound(db, path)
        version = _version(db)
        if version != FORMAT:
            raise StoreError(
                f"{path} has format {version}, this build reads format {FORMAT}; "
                + ("start its coordinator once to take it over" if version == 0 else "use the version that wrote it")
            )
    except BaseException:
        db.close()
        raise
    return db


def append(db: sqlite3.Connection, log: Log, mark: Mark, rows: Sequence[Sequence[object]]) -> Mark:
    """Add rows, whose last column is the record, to the end of a log; the new mark. Call it in a transaction."""
    number, before = mark
    chained: list[tuple[object, ...]] = []
    for row in rows:
        before = link(before, str(row[-1]))
        chained.append((*row, before))
    db.executemany(_INSERT[log], chained)
    return number + len(chained), before


def event_rows(events: Sequence[Event]) -> list[tuple[int | None, str | None, str]]:
    """Round and client of an update, None for other events, and the event's text."""
    return [
        (*((event.round, event.client) if isinstance(event, UpdateAccepted) else (None, None)), event_to_json(event))
        for event in events
    ]


def newest(db: sqlite3.Connection, log: Log) -> Mark:
    """The mark of a log as it is."""
    row = db.execute(f"SELECT seq, link FROM {log} ORDER BY seq DESC LIMIT 1").fetchone()  # one of two constants
    return (int(row[0]), str(row[1])) if row else (0, beginning(log))


def check_mark(db: sqlite3.Connection, path: Path, log: str, mark: Mark) -> None:
    """Refuse a log that does not go as far as a mark from some time before; it is not read for that.

    Raises:
        StoreError: It does not.
    """
    if log not in LOGS:
        raise StoreError(f"{path}: the mark beside it names a log {log[:20]!r} that this build does not know")
    row = db.execute(f"SELECT link FROM {log} WHERE seq = ?", (mark[0],)).fetchone()  # one of two constants
    if mark != (0, beginning(log)) and row != (mark[1],):
        raise StoreError(
            f"{path}: the log of {log} had {mark[0]} records once, and record {mark[0]} is "
            f"{'another one' if row else 'missing'}; restore the state directory from a backup"
        )


def read_log(db: sqlite3.Connection, path: Path, log: Log, mark: Mark) -> Iterator[tuple[str, str]]:
    """Records and links of a log, each checked. Read them within a transaction.

    Raises:
        StoreError: See `chain.follow`.
    """
    rows = db.execute(f"SELECT seq, body, link FROM {log} ORDER BY seq")  # one of two constants
    return follow(str(path), log, rows, mark)


def read_events(db: sqlite3.Connection, path: Path, mark: Mark) -> list[Event]:
    """The whole event log, checked.

    Raises:
        StoreError: The chain is broken, a row is not an event of this build, or the index says something else.
    """
    events = [event_from_json(body) for body, _ in read_log(db, path, "events", mark)]
    indexed = db.execute("SELECT update_round, update_client FROM events ORDER BY seq")
    for number, (row, event) in enumerate(zip(indexed, event_rows(events), strict=True), 1):
        if row != event[:2]:
            raise StoreError(
                f"{path}: record {number} of the log of events is filed under {row}, not under {event[:2]}; "
                "restore the state directory from a backup"
            )
    return events


def read_epoch(db: sqlite3.Connection, path: Path) -> int:
    """How often the directory was opened.

    Raises:
        StoreError: Openings are missing.
    """
    count, last = db.execute("SELECT count(*), coalesce(max(epoch), 0) FROM opened").fetchone()
    if count != last:
        raise StoreError(f"{path}: {count} openings are listed up to number {last}; restore it from a backup")
    return int(count)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the disk or the database says into a StoreError that names the file."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{path}: {error}; free or repair the disk, then start the coordinator again") from error


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block or none of it; nobody else writes meanwhile."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def _check_sound(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a file whose pages or indexes contradict each other."""
    db.execute("PRAGMA cell_size_check=ON")
    found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise StoreError(f"{path} is damaged: {found}; restore the state directory from a backup")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
