"""What the coordinator remembers on disk: an event log and a folder of content-addressed blobs.

One directory belongs to one run and to one process at a time. Layout::

    lock        held exclusively while the store is open
    run.db      SQLite: the event log and the number of times the store was opened
    blobs/      one file per blob, named by its SHA-256

A blob is durable before the event that names it: write a temporary file, fsync, rename, fsync the folder,
then commit the row. An error of the disk is final: the caller must stop, because after a failed fsync
nobody can say which bytes reached the disk.
"""

import fcntl
import hashlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedloom.proto.errors import StoreError
from fedloom.proto.failpoints import failpoint, reach
from fedloom.server.rounds import Event, UpdateAccepted, event_from_json, event_to_json

__all__ = ["Store"]

_TEMPORARY = ".tmp"
_TABLES = """
CREATE TABLE IF NOT EXISTS opened (epoch INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, update_round INTEGER, update_client TEXT, body TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_update ON events (update_round, update_client) WHERE update_round IS NOT NULL;
"""


class Store:
    """The state directory of one run, open in this process.

    Args:
        folder: The directory; if it does not exist it is made, for this user alone.
        durable: True: an event or blob is on the disk when the call returns. False: nothing is ever
            synchronised, for simulations and benchmarks; the state then survives the death of this
            process but not of the machine.

    Attributes:
        epoch: How many times this directory has been opened, this time included; 1 at first.

    Raises:
        StoreError: Another process has it open, or the disk or the database refuses.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder
        self.durable = durable
        self._blobs = folder / "blobs"
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        self._forgotten: list[Path] = []
        with _explained(folder):
            # Closed to other users: updates lie here before any noise, and so does the secret of the noise.
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self._blobs.mkdir(exist_ok=True)
        self._lock = _lock(folder)
        try:
            with _explained(folder):
                for torn in self._blobs.glob(f"*{_TEMPORARY}"):
                    torn.unlink()
                self._db = _connect(folder / "run.db", durable)
                self.epoch = self._next_epoch()
                if durable:
                    _sync_folder(folder)
                reach("store.opened")
        except StoreError:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        """The store itself; leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the store."""
        self.close()

    def close(self) -> None:
        """Give the directory up for the next process. Calling it again does nothing."""
        with self._mutex:
            self._db.close()
            self._lock.close()

    @failpoint("store.append")
    def append(self, *events: Event) -> None:
        """Write events in one transaction: all of them or none.

        Raises:
            StoreError: The database refuses, or an update for this round and client is already there.
        """
        rows = [
            (
                *((event.round, event.client) if isinstance(event, UpdateAccepted) else (None, None)),
                event_to_json(event),
            )
            for event in events
        ]
        with self._mutex, _explained(self.folder / "run.db"), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._check_newest()
            self._db.executemany("INSERT INTO events (update_round, update_client, body) VALUES (?, ?, ?)", rows)
            reach("store.append.begun")
        reach("store.appended")

    @failpoint("store.read")
    def events(self) -> list[Event]:
        """The whole log, oldest first.

        Raises:
            StoreError: The database refuses, or a row is not an event of this build.
        """
        with self._mutex, _explained(self.folder / "run.db"):
            rows = self._db.execute("SELECT body FROM events ORDER BY seq").fetchall()
        return [event_from_json(body) for (body,) in rows]

    def accepted(self, round: int, client: str) -> UpdateAccepted | None:
        """The update of `client` accepted in `round`, of any round ever.

        Raises:
            StoreError: The database refuses.
        """
        query = "SELECT body FROM events WHERE update_round = ? AND update_client = ?"
        with self._mutex, _explained(self.folder / "run.db"):
            row = self._db.execute(query, (round, client)).fetchone()
        event = event_from_json(row[0]) if row else None
        return event if isinstance(event, UpdateAccepted) else None

    @failpoint("store.blob")
    def put_blob(self, blob: bytes, digest: str | None = None) -> str:
        """Keep `blob` and return its SHA-256, hex. Keeping it twice is keeping it once.

        Args:
            blob: The bytes.
            digest: Their SHA-256 if the caller has just computed it, which saves computing it again.

        Raises:
            StoreError: The disk refuses.
        """
        digest = digest or hashlib.sha256(blob).hexdigest()
        target = self._blobs / digest
        with _explained(target):
            if target.exists():
                return digest
            temporary = self._temporary(digest)
            with temporary.open("wb", buffering=0) as file:
                file.write(blob)
                reach("store.blob.written")
                if self.durable:
                    os.fsync(file.fileno())
            reach("store.blob.synced")
            temporary.rename(target)
            reach("store.blob.renamed")
            if self.durable:
                _sync_folder(self._blobs)
        return digest

    @failpoint("store.fetch")
    def get_blob(self, digest: str) -> bytes:
        """The blob with this SHA-256, which is checked again.

        Raises:
            StoreError: It is missing, or its bytes have changed.
        """
        target = self._blobs / digest
        with _explained(target):
            blob = target.read_bytes()
        if hashlib.sha256(blob).hexdigest() != digest:
            raise StoreError(f"{target} does not have the bytes its name promises; restore it from a backup")
        return blob

    @failpoint("store.sweep")
    def sweep(self, keep: Collection[str]) -> None:
        """Forget every blob but those in `keep`. One that another thread is writing right now stays.

        They only lose their names here, which is quick; `discard` gives their space back.

        Raises:
            StoreError: The disk refuses.
        """
        with _explained(self._blobs):
            for entry in self._blobs.iterdir():
                if entry.name not in keep and entry.suffix != _TEMPORARY:
                    self._forgotten.append(entry.rename(self._temporary(entry.name)))
                    reach("store.swept")

    @failpoint("store.discard")
    def discard(self) -> None:
        """Delete what `sweep` has forgotten; freeing large files takes milliseconds, so do it off any lock.

        Raises:
            StoreError: The disk refuses.
        """
        while self._forgotten:
            try:
                path = self._forgotten.pop()
            except IndexError:  # another thread took the last one
                return
            with _explained(path):
                path.unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        """A name that nothing else has; what a crash leaves under one is deleted at the next opening."""
        return self._blobs / f"{name}.{next(self._numbers)}{_TEMPORARY}"

    def _check_newest(self) -> None:
        """Refuse to write after somebody else has opened the directory: not every file system's locks hold.

        The transaction that is open keeps it so until it ends.
        """
        newest = self._db.execute("SELECT max(epoch) FROM opened").fetchone()[0]
        if newest != self.epoch:
            raise StoreError(
                f"{self.folder} was opened as epoch {self.epoch}, and another coordinator has opened it since, as "
                f"epoch {newest}; this one must not write any more: stop it"
            )

    @failpoint("store.epoch")
    def _next_epoch(self) -> int:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            return int(self._db.execute("INSERT INTO opened DEFAULT VALUES RETURNING epoch").fetchone()[0])


def _lock(folder: Path) -> IO[bytes]:
    """An exclusive lock on the directory; the operating system drops it when this process dies."""
    with _explained(folder / "lock"):
        file = (folder / "lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreError(
                f"{folder} is in use by another coordinator; stop that one or give this run another directory"
            ) from None
    return file


def _connect(path: Path, durable: bool) -> sqlite3.Connection:
    """The database in WAL mode, with its tables. The switch to WAL fails silently unless its answer is read."""
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        db.close()
        raise StoreError(f"{path} stays in journal mode {mode!r}; put the state on a local disk that supports WAL")
    db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
    db.executescript(_TABLES)
    return db


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the disk or the database says into a StoreError that names the file."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{path}: {error}; free or repair the disk, then start the coordinator again") from error
