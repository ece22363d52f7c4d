"""A state directory as it lies there: what it holds, and whether it is what was written. Nothing is changed."""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, StoreError
from fedloom.server.rounds.run_log import may_be
from fedloom.server.rounds.state import Event, Rounds, apply
from fedloom.server.storage.audit_log import AuditRecord, record_from_json
from fedloom.server.storage.hash_chain import read_mark
from fedloom.server.storage.sqlite import connect_readonly, explained, read_epoch, read_events, read_log

__all__ = ["Snapshot", "holder", "look", "newest_state", "read_blob", "state_folders", "verify"]

_LOOKS = 5


@dataclass(frozen=True)
class Snapshot:
    """What a state directory holds at one moment; both logs are what was written."""

    epoch: int
    events: tuple[Event, ...]
    audit: tuple[AuditRecord, ...]
    rounds: Rounds
    """Where the run stands."""
    links: tuple[tuple[str, ...], tuple[str, ...]]
    """The links of the event log and of the audit log, oldest first."""


def state_folders(folder: Path) -> list[Path]:
    """The state directories at or below `folder`, sorted: itself, NAME, or NAME/state as `fedloom server` makes it."""
    found = [folder] if (folder / "run.db").is_file() else []
    return found + sorted(path.parent for depth in ("*", "*/state") for path in folder.glob(f"{depth}/run.db"))


def look(folder: Path) -> Snapshot:
    """Read a state directory, also while a coordinator works on it.

    Raises:
        StoreError: It is none, or a record of a log is missing or not what was written; the first one is named.
    """
    path = folder / "run.db"
    with explained(path), closing(connect_readonly(path)) as db:
        marks = read_mark(folder / "mark")  # before the logs: they may have grown since, but never shrunk
        with _unchanging(db):
            events = read_events(db, path, marks["events"])
            links = tuple(link for _, link in read_log(db, path, "events", marks["events"]))
            audit = list(read_log(db, path, "audit", marks["audit"]))
            epoch = read_epoch(db, path)
    rounds = Rounds()
    for event in events:
        rounds = apply(rounds, event)
    records = tuple(record_from_json(body) for body, _ in audit)
    return Snapshot(epoch, tuple(events), records, rounds, (links, tuple(link for _, link in audit)))


def newest_state(folder: Path, config: RunConfig) -> bytes:
    """The strategy's state after the last commit, as it was stored, also while a coordinator works on the directory.

    Args:
        folder: The state directory.
        config: The run file that the coordinator was started with, calibrated and the base model pinned.

    Raises:
        ConfigError: The directory holds another run.
        StoreError: It is none, holds no run, or what it holds is not what was written.
    """
    for _ in range(_LOOKS):
        rounds = look(folder).rounds
        if rounds.created is None:
            raise StoreError(f"no run has begun in {folder}; start `fedloom server` with it first")
        if not may_be(config, rounds.created.spec):
            raise ConfigError(
                f"{folder} holds run {rounds.created.run[:8]} of another run file or base model; give the run file and "
                "the overrides that its coordinator was started with"
            )
        blob = folder / "blobs" / rounds.state
        # The coordinator may have committed the next round since, and swept this one's state.
        with explained(blob), suppress(FileNotFoundError):
            return read_blob(blob)
    raise StoreError(f"{blob} is missing; restore it from a backup")


def read_blob(blob: Path) -> bytes:
    """What a file of `blobs` holds.

    Raises:
        StoreError: Not what its name promises.
        FileNotFoundError: There is none.
    """
    content = blob.read_bytes()
    if sha256(content).hexdigest() != blob.name:
        raise StoreError(f"{blob} does not have the bytes its name promises; restore it from a backup")
    return content


def verify(folder: Path, heads: tuple[str, ...] = ()) -> tuple[Snapshot, int | None]:
    """Check everything in a state directory that a coordinator would go on from.

    Args:
        folder: The state directory.
        heads: Links noted earlier, each the last of one of the logs then; each log must still contain its own.

    Returns:
        What it holds, and how many blobs were compared with their names; None when a coordinator has it open, whose
        blobs come and go.

    Raises:
        StoreError: Something is missing or is not what was written; it is named.
    """
    snapshot = look(folder)
    for head in heads:
        if not any(head in links for links in snapshot.links):
            raise StoreError(
                f"{folder / 'run.db'}: no record has the link {head[:80]!r}; the log is another one than that which "
                "was noted, restore the state directory from a backup"
            )
    if holder(folder) is not None:
        return snapshot, None
    rounds = snapshot.rounds
    needed = {rounds.state, *(update.digest for update in rounds.updates.values())} - {""}
    for digest in sorted(needed):
        blob = folder / "blobs" / digest
        with explained(blob):
            read_blob(blob)
    return snapshot, len(needed)


def holder(folder: Path) -> int | None:
    """Process id of the coordinator that has the directory open; None when nobody has.

    Raises:
        StoreError: The lock cannot be read.
    """
    path = folder / "lock"
    with explained(path), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            if not text.isdigit():
                raise StoreError(f"{path} is held but names no process; try again") from None
            return int(text)
    return None


@contextmanager
def _unchanging(db: sqlite3.Connection) -> Iterator[None]:
    """The same content for every query of the block, whatever a coordinator writes meanwhile."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.rollback()
