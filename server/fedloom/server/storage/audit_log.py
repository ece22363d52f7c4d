"""The security audit log: who joined, who was refused, whose update was rejected. No decision is ever read from it.

Its records are chained by hashes like the event log's, see `chain`. They hold wall-clock times, for people to read.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Literal, Protocol, get_args

from fedloom.core.errors import StoreError
from fedloom.core.limits import MAX_NAME_LENGTH
from fedloom.core.text import clean

__all__ = ["Audit", "AuditKind", "AuditRecord", "Notebook", "record_from_json", "record_to_json"]

AuditKind = Literal[
    "started",
    "joined",
    "refused",
    "rejected",
    "invited",
    "enrolled",
    "renewed",
    "revoked",
    "stopped",
    "omitted",
    "declined",
    "doubled",
]

_MOST_REFUSED = 100
_PER_S = 60.0
"""Refusals cost the peer nothing, so only so many a minute are written; the rest is counted."""
_DETAIL_LENGTH = 500


@dataclass(frozen=True)
class AuditRecord:
    """One line of the audit log."""

    at: str
    """UTC by the machine's clock, ISO 8601."""
    epoch: int
    kind: AuditKind
    client: str
    """Whom it is about, as far as known; it may be a name that a stranger claimed."""
    detail: str


class Notebook(Protocol):
    """Where audit records are kept; a store is one."""

    epoch: int

    def note(self, *records: AuditRecord) -> None:
        """Make records durable, in this order."""


class Audit:
    """Takes notes from any thread at any time; `write` makes them durable.

    Args:
        notebook: Keeps the records.
        clock: Seconds, never going back; for the limit on refusals.

    Attributes:
        refusals: How often something was refused, those included that are not written.
    """

    def __init__(self, notebook: Notebook, clock: Callable[[], float] = time.monotonic) -> None:
        self._notebook, self._clock = notebook, clock
        self._mutex = threading.Lock()
        self._notes: list[AuditRecord] = []
        self._broken = False
        self.refusals = 0
        self._since_s, self._refused, self._omitted = clock(), 0, 0

    def note(self, kind: AuditKind, client: str = "", detail: str = "") -> None:
        """Take a note. Of refusals only the first hundred a minute are kept, and the number of the others."""
        with self._mutex:
            if kind == "refused":
                self._turn()
                self.refusals += 1
                self._refused += 1
                if self._refused > _MOST_REFUSED:
                    self._omitted += 1
                    return
            self._add(kind, client, detail)

    def write(self, *, ending: bool = False) -> None:
        """Make all notes durable.

        Args:
            ending: No more notes will come, so a minute that is not over is reported too.

        Raises:
            StoreError: The disk refuses.
        """
        with self._mutex:
            self._turn(ending=ending)
            notes, self._notes = self._notes, []
        if notes and not self._broken:
            try:
                self._notebook.note(*notes)
            except StoreError:
                self._broken = True  # a disk that has failed is not written to again
                raise

    def _turn(self, *, ending: bool = False) -> None:
        """Begin a new minute if this one is over, and say what the last one left out."""
        if not ending and self._clock() - self._since_s < _PER_S:
            return
        if self._omitted:
            self._add("omitted", "", f"{self._omitted} more refusals within a minute")
        self._since_s, self._refused, self._omitted = self._clock(), 0, 0

    def _add(self, kind: AuditKind, client: str, detail: str) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        name, text = clean(client, MAX_NAME_LENGTH), clean(detail, _DETAIL_LENGTH)
        self._notes.append(AuditRecord(at, self._notebook.epoch, kind, name, text))


def record_to_json(record: AuditRecord) -> str:
    """One row of the audit log."""
    return json.dumps(asdict(record), separators=(",", ":"))


def record_from_json(text: str) -> AuditRecord:
    """Read what `record_to_json` wrote.

    Raises:
        StoreError: The row is not an audit record of this build.
    """
    try:
        document = json.loads(text)
        record = AuditRecord(**{each.name: document.pop(each.name) for each in fields(AuditRecord)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"audit log row {text[:80]!r} is not of this version: {error!r}") from error
    if document or record.kind not in get_args(AuditKind):
        raise StoreError(f"audit log row {text[:80]!r} is not of this version; run the version that wrote it")
    return record
