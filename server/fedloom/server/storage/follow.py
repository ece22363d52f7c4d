"""A run as its logs tell it, followed while somebody writes to them: every reading takes up what is new.

Read through connections of its own, so that a coordinator at work waits for no reader.
"""

import threading
from collections import Counter, deque
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedloom.core.errors import StoreError
from fedloom.server.monitoring.participation import Asked
from fedloom.server.monitoring.round_times import Pace
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    RoundOpened,
    Rounds,
    RunEnded,
    SumAccepted,
    UpdateAccepted,
    apply,
    event_from_json,
)
from fedloom.server.storage.audit_log import AuditRecord, record_from_json
from fedloom.server.storage.event_times import Traffic, read_times, read_traffic
from fedloom.server.storage.hash_chain import beginning, link
from fedloom.server.storage.sqlite import LOGS, Log, connect_readonly, explained, read_epoch

__all__ = ["Happening", "Journal", "Past"]

_TROUBLE = frozenset({"refused", "rejected", "revoked", "omitted", "declined", "doubled"})
"""What strangers can cause as often as they like has a place of its own, where it pushes out nothing else."""
_KEPT = 100
_LOST = {
    "left": "it left; its own log says why",
    "lease": "no sign of life within rounds.lease_s",
    "rejected": "its update was rejected",
}
_ENDED = {"short": "clients did not come within rounds.give_up_s", "told": "an operator said so"}


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
    took_s: float | None
    """From its first opening to its commit; None if that is not known."""
    done_s: float | None
    """When it was committed, seconds since 1970."""


@dataclass(frozen=True)
class Happening:
    """One line of what happened in a run, for people."""

    at: str
    """UTC, ISO 8601; empty if it is not known."""
    kind: str
    client: str
    detail: str


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
        happened: The newest of all else: who joined, was lost or enrolled, and what the coordinator did.
        pace: How long rounds took, and who was slow.
        traffic: Bytes so far.
        epoch: How often the directory was opened.
        starts: How often a coordinator began to work on it.
    """

    folder: Path
    rounds: Rounds = field(default_factory=Rounds)
    past: list[Past] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)
    accepted: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    joined: dict[str, str] = field(default_factory=dict)
    trouble: "deque[Happening]" = field(default_factory=lambda: deque(maxlen=_KEPT))
    happened: "deque[Happening]" = field(default_factory=lambda: deque(maxlen=_KEPT))
    pace: Pace = field(default_factory=Pace)
    traffic: Traffic = field(default_factory=Traffic)
    epoch: int = 0
    starts: int = 0
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
            times = read_times(db, self._marks["events"][0])
            for log in LOGS:
                number, before = self._marks[log]
                # One of two constants, not a name from outside.
                rows = db.execute(f"SELECT seq, body, link FROM {log} WHERE seq > ? ORDER BY seq", (number,))
                for seq, body, stored in rows:
                    if seq != number + 1 or link(before, body) != stored:
                        raise StoreError(f"{path}: record {number + 1} of the log of {log} is not what was written")
                    if log == "events":
                        self._event(event_from_json(body), times.get(seq))
                    else:
                        self._note(record_from_json(body))
                    number, before = seq, stored
                    self._marks[log] = number, before
            self.epoch, self.traffic = read_epoch(db, path), read_traffic(db)

    def _event(self, event: Event, at_s: float | None) -> None:
        self.rounds = apply(self.rounds, event)
        self.asked.add(event)
        took_s = self.pace.add(event, at_s)
        match event:
            case UpdateAccepted(client=client):
                self.accepted[client] += 1
                self._lost_now.discard(client)
            case SumAccepted(clients=clients):
                self.accepted.update(clients)
            case ClientLost(round=number, client=client, reason=reason):
                self.lost[reason] += 1
                self._lost_now.add(client)
                self._happen(at_s, "lost", client, f"in round {number + 1}: {_LOST[reason]}")
            case RoundOpened(round=number, attempt=attempt, cohort=cohort) if attempt:
                self._happen(at_s, "reopened", "", f"round {number + 1}, with {len(cohort)} clients: too few were left")
            case RunEnded(round=number, reason=ending):
                self._happen(at_s, "ended", "", f"with {number} rounds: {_ENDED[ending]}")
            case RoundClosed():
                self._closed = event
            case AdapterCommitted(round=number):
                assert self._closed is not None  # `apply` checks
                folded, why = len(self._closed.clients), self._closed.reason
                lost = len(self._lost_now)
                self.past.append(Past(number, folded, lost, why, self.asked.most, took_s, at_s))
                self._lost_now = set()
            case _:
                pass

    def _note(self, record: AuditRecord) -> None:
        self.noted[record.kind] += 1
        if record.kind == "joined":
            self.joined[record.client] = record.at
        if record.kind == "started":
            self.starts += 1
        again = record.kind == "started" and self.starts > 1
        found = Happening(record.at, "restarted" if again else record.kind, record.client, record.detail)
        (self.trouble if record.kind in _TROUBLE else self.happened).append(found)

    def _happen(self, at_s: float | None, kind: str, client: str, detail: str) -> None:
        at = "" if at_s is None else datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
        self.happened.append(Happening(at, kind, client, detail))
