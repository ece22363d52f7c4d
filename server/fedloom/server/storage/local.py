"""What the coordinator remembers on disk: an event log and a folder of content-addressed blobs.

One directory belongs to one run and to one process at a time. Layout::

    lock        held exclusively while the store is open; the holder's process id
    run.db      SQLite: the event log, the audit log, the number of times the store was opened, and a diary
    mark        number and link of the newest record of both logs, so that a log that lost its end is noticed
    blobs/      one file per blob, named by its SHA-256

A blob is durable before the event that names it: write a temporary file, fsync, rename, fsync the folder,
then commit the row. An error of the disk is final: the caller must stop, because after a failed fsync
nobody can say which bytes reached the disk.
"""

import fcntl
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedloom.core.errors import StoreError
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.server.rounds.state import Event, UpdateAccepted, event_from_json
from fedloom.server.storage.audit_log import AuditRecord, record_from_json, record_to_json
from fedloom.server.storage.event_times import begin_diary, read_times, read_traffic, write_times, write_traffic
from fedloom.server.storage.hash_chain import Mark, mark_to_bytes, read_mark
from fedloom.server.storage.sqlite import (
    LOGS,
    Log,
    append,
    check_mark,
    connect,
    event_rows,
    explained,
    newest,
    read_epoch,
    read_events,
    read_log,
    transaction,
    upgrade,
)

__all__ = ["Store"]

_TEMPORARY = ".tmp"


class Store:
    """The state directory of one run, open in this process.

    Args:
        folder: The directory; if it does not exist it is made, for this user alone.
        durable: True: an event or blob is on the disk when the call returns. False: nothing is ever
            synchronised, for simulations and benchmarks; the state then survives the death of this
            process but not of the machine.

    Attributes:
        epoch: How many times this directory has been opened, this time included; 1 at first.
        traffic: Bytes of the whole run; what is counted is written with whatever is written next.
        appended: Called with the events of each transaction once they are durable, none for the audit log's, and with
            the seconds that took. It delays whoever writes.

    Raises:
        StoreError: Another process has it open, or the disk or the database refuses.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder
        self.durable = durable
        self.appended: Callable[[Sequence[Event], float], None] = lambda events, seconds: None
        self._blobs, self._path = folder / "blobs", folder / "run.db"
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        self._forgotten: list[Path] = []
        with explained(folder):
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            # Closed to other users: updates lie here before any noise, and so does the secret of the noise.
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self._blobs.mkdir(exist_ok=True)
            if durable:
                for each in made:
                    _sync_folder(each.parent)
        self._lock = _lock(folder)
        with ExitStack() as on_failure:
            on_failure.callback(self._lock.close)
            with explained(folder):
                for torn in self._blobs.glob(f"*{_TEMPORARY}"):
                    torn.unlink()
            with explained(self._path):
                self._db = on_failure.enter_context(closing(connect(self._path, durable)))
                self._marks, self._mark = self._open_logs()
                self.traffic = read_traffic(self._db)
                on_failure.callback(self._mark.close)
                self.epoch = self._next_epoch()
            with explained(folder):
                if durable:
                    _sync_folder(folder)
                reach("store.opened")
            on_failure.pop_all()

    def __enter__(self) -> Self:
        """The store itself; leaving the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the store."""
        self.close()

    @property
    def where(self) -> str:
        """The directory's path."""
        return str(self.folder)

    def close(self) -> None:
        """Give the directory up for the next process. Calling it again does nothing."""
        with self._mutex:
            self._db.close()
            self._mark.close()
            self._lock.close()

    @failpoint("store.append")
    def append(self, *events: Event) -> None:
        """Write events in one transaction: all of them or none.

        Raises:
            StoreError: The database refuses, or an update for this round and client is already there.
        """
        began_s = time.perf_counter()
        self._append("events", event_rows(events))
        self.appended(events, time.perf_counter() - began_s)

    def note(self, *records: AuditRecord) -> None:
        """Write audit records in one transaction: all of them or none.

        Raises:
            StoreError: The database refuses.
        """
        began_s = time.perf_counter()
        self._append("audit", [(record_to_json(record),) for record in records])
        self.appended((), time.perf_counter() - began_s)

    def count(self) -> None:
        """Write what `traffic` has counted since the last transaction, if anything.

        Raises:
            StoreError: The database refuses.
        """
        if self.traffic.unwritten:
            with self._mutex, explained(self._path), transaction(self._db):
                self._check_newest()
                write_traffic(self._db, *self.traffic.take())

    def times(self) -> dict[int, float]:
        """When each event was written, seconds since 1970, by its number in the log from 1; some may be missing.

        Raises:
            StoreError: The database refuses.
        """
        with self._mutex, explained(self._path):
            return read_times(self._db)

    @failpoint("store.read")
    def events(self) -> list[Event]:
        """The whole event log, oldest first.

        Raises:
            StoreError: The database refuses, the chain is broken, or a row is not an event of this build.
        """
        with self._mutex, explained(self._path):
            return read_events(self._db, self._path, self._marks["events"])

    def audit(self) -> list[AuditRecord]:
        """The whole audit log, oldest first.

        Raises:
            StoreError: The database refuses, the chain is broken, or a row is not a record of this build.
        """
        with self._mutex, explained(self._path):
            rows = list(read_log(self._db, self._path, "audit", self._marks["audit"]))
        return [record_from_json(body) for body, _ in rows]

    def accepted(self, round: int, client: str) -> UpdateAccepted | None:
        """The update of `client` accepted in `round`, of any round ever.

        Raises:
            StoreError: The database refuses.
        """
        query = "SELECT body FROM events WHERE update_round = ? AND update_client = ?"
        with self._mutex, explained(self._path):
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
        with explained(target):
            if target.exists():
                if self.durable:  # whoever gave it its name may not have come to this yet
                    _sync_folder(self._blobs)
                return digest
            self._put(blob, target)
        return digest

    @failpoint("store.fetch")
    def get_blob(self, digest: str) -> bytes:
        """The blob with this SHA-256, which is checked again.

        Raises:
            StoreError: It is missing, or its bytes have changed.
        """
        target = self._blobs / digest
        with explained(target):
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
        with explained(self._blobs):
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
            with explained(path):
                path.unlink(missing_ok=True)

    def _put(self, content: bytes, target: Path) -> None:
        """Make a file that is there as a whole or not at all."""
        temporary = self._temporary(target.name)
        with temporary.open("wb", buffering=0) as file:
            file.write(content)
            reach("store.blob.written")
            if self.durable:
                os.fsync(file.fileno())
        reach("store.blob.synced")
        temporary.rename(target)
        reach("store.blob.renamed")
        if self.durable:
            _sync_folder(target.parent)

    def _temporary(self, name: str) -> Path:
        """A name that nothing else has; what a crash leaves under one is deleted at the next opening."""
        return self._blobs / f"{name}.{next(self._numbers)}{_TEMPORARY}"

    def _append(self, log: Log, rows: Sequence[Sequence[object]]) -> None:
        with self._mutex, explained(self._path):
            with transaction(self._db):
                self._check_newest()
                mark = append(self._db, log, self._marks[log], rows)
                if log == "events":
                    write_times(self._db, self._marks[log][0] + 1, len(rows), time.time())
                write_traffic(self._db, *self.traffic.take())
                reach("store.append.begun")
            reach("store.appended")
            # After the commit, so that the mark is never ahead of what the disk has.
            self._marks[log] = mark
            os.pwrite(self._mark.fileno(), mark_to_bytes(self._marks), 0)

    def _open_logs(self) -> tuple[dict[str, Mark], IO[bytes]]:
        """The marks of both logs, and the file that keeps them.

        Raises:
            StoreError: A log does not go as far as its mark says.
        """
        path = self.folder / "mark"
        with transaction(self._db):
            upgraded = upgrade(self._db, self._path)
            begin_diary(self._db)
            marks: dict[str, Mark] = {log: newest(self._db, log) for log in LOGS}
            if upgraded and not path.exists():
                # Within the transaction: if the process dies after this line, the same links are made again.
                self._put(mark_to_bytes(marks), path)
            # A database that seems to be new but has a mark has lost everything.
            for log, mark in read_mark(path).items():
                check_mark(self._db, self._path, log, mark)
        file = path.open("rb+", buffering=0)
        return marks, file

    def _check_newest(self) -> None:
        """Refuse to write after somebody else has opened the directory: not every file system's locks hold.

        The transaction that is open keeps it so until it ends.
        """
        latest = read_epoch(self._db, self._path)
        if latest != self.epoch:
            raise StoreError(
                f"{self.folder} was opened as epoch {self.epoch}, and another coordinator has opened it since, as "
                f"epoch {latest}; this one must not write any more: stop it"
            )

    @failpoint("store.epoch")
    def _next_epoch(self) -> int:
        with transaction(self._db):
            self._db.execute("INSERT INTO opened DEFAULT VALUES")
            return read_epoch(self._db, self._path)


def _lock(folder: Path) -> IO[bytes]:
    """An exclusive lock on the directory; the operating system drops it when this process dies."""
    with explained(folder / "lock"):
        file = (folder / "lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreError(
                f"{folder} is in use by another coordinator; stop that one or give this run another directory"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
    return file


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
