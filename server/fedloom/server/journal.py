"""A run as its logs tell it, followed while somebody writes to them: every reading takes up what is new.

Read through connections of its own, so that a coordinator at work waits for no reader.
"""

import threading
from collections import Counter, deque
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.proto.errors import StoreError
from fedloom.server.audit import AuditRecord, record_from_json
from fedloom.server.chain import beginning, link
from fedloom.server.database import LOGS, Log, connect_readonly, explained, read_epoch
from fedloom.server.participation import Asked
from fedloom.server.rounds import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    Rounds,
    SumAccepted,
    UpdateAccepted,
    apply,
    event_from_json,
)

__all__ = ["Journal", "Past"]

_TROUBLE = frozenset({"refused", "rejected", "revoked", "omitted", "declined"})
_KEPT = 100


@dataclass(frozen=True)
class Past:
    """One committed round."""

    round: int
    clients: int
    """Whose updates were folded."""
    lost: int
    """Whom it stopped waiting for."""
    reason: str
    """Why it closed: complete or deadline."""
    most_asked: int
    """Rounds that the client asked most often had been asked for by then."""


@dataclass
class Journal:
    """What the logs of one state directory say so far.

    Args:
        folder: The state directory.

    Attributes:
        rounds: Where the run stands.
        past: The committed rounds, oldest first.
        asked: How often each client was asked.
        accepted: Updates accepted, by client.
        lost: Clients lost, by reason.
        noted: Records of the audit log, by kind.
        joined: When each client joined last, ISO 8601.
        trouble: The newest records of refusals and the like, oldest first.
        epoch: How often the directory was opened.
    """

    folder: Path
    rounds: Rounds = field(default_factory=Rounds)
    past: list[Past] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)
    accepted: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    joined: dict[str, str] = field(default_factory=dict)
    trouble: "deque[AuditRecord]" = field(default_factory=lambda: deque(maxlen=_KEPT))
    epoch: int = 0
    _marks: dict[Log, tuple[int, str]] = field(default_factory=lambda: {log: (0, beginning(log)) for log in LOGS})
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _lost_now: set[str] = field(default_factory=set)
    _closed: RoundClosed | None = None

    def refresh(self) -> None:
        """Take up what was written since the last call.

        Raises:
            StoreError: A log cannot be read, or is not what was written.
        """
        path = self.folder / "run.db"
        with self._mutex, explained(path), closing(connect_readonly(path, sound=self.epoch > 0)) as db:
            for log in LOGS:
                number, before = self._marks[log]
                # One of two constants, not a name from outside.
                rows = db.execute(f"SELECT seq, body, link FROM {log} WHERE seq > ? ORDER BY seq", (number,))
                for seq, body, stored in rows:
                    if seq != number + 1 or link(before, body) != stored:
                        raise StoreError(f"{path}: record {number + 1} of the log of {log} is not what was written")
                    if log == "events":
                        self._event(event_from_json(body))
                    else:
                        self._note(record_from_json(body))
                    number, before = seq, stored
                    self._marks[log] = number, before
            self.epoch = read_epoch(db, path)

    def _event(self, event: Event) -> None:
        self.rounds = apply(self.rounds, event)
        self.asked.add(event)
        match event:
            case UpdateAccepted(client=client):
                self.accepted[client] += 1
                self._lost_now.discard(client)
            case SumAccepted(clients=clients):
                self.accepted.update(clients)
            case ClientLost(client=client, reason=reason):
                self.lost[reason] += 1
                self._lost_now.add(client)
            case RoundClosed():
                self._closed = event
            case AdapterCommitted(round=number):
                assert self._closed is not None  # `apply` checks
                folded, why = len(self._closed.clients), self._closed.reason
                self.past.append(Past(number, folded, len(self._lost_now), why, self.asked.most))
                self._lost_now = set()
            case _:
                pass

    def _note(self, record: AuditRecord) -> None:
        self.noted[record.kind] += 1
        if record.kind == "joined":
            self.joined[record.client] = record.at
        elif record.kind in _TROUBLE:
            self.trouble.append(record)
