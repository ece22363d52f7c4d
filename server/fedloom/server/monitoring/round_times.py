"""How long rounds took and who was slow in them, from the events and the times at which they were written."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientAsked,
    ClientLost,
    Event,
    LostReason,
    RoundOpened,
    SumAccepted,
    UpdateAccepted,
)

__all__ = ["Answers", "Pace"]

_KEPT = 20


@dataclass
class Answers:
    """What came of one round's clients."""

    round: int
    took_s: dict[str, float | None] = field(default_factory=dict)
    """From being asked to an update on the disk; None where a time is not known. Of a sum, from the opening."""
    lost: dict[str, LostReason] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    """Asked, and neither answered nor lost when the round closed, if it has."""


class Pace:
    """Follows a run's events.

    Times are the machine's own: a coordinator that stood still in between makes a round longer, and a clock that was
    set back makes one's length unknown, not negative.

    Attributes:
        began_s: When the first round was opened, seconds since 1970.
        ended_s: When the newest round was committed.
        answers: Of the newest rounds, the open one last.
    """

    def __init__(self) -> None:
        self.began_s: float | None = None
        self.ended_s: float | None = None
        self.answers: deque[Answers] = deque(maxlen=_KEPT)
        self._opened_s: float | None = None
        self._asked_s: dict[str, float | None] = {}
        self._lengths_s: deque[float] = deque(maxlen=_KEPT)

    def add(self, event: Event, at_s: float | None) -> float | None:
        """Take one more event, oldest first; the length in seconds of the round that it commits, if known."""
        match event:
            case RoundOpened():
                self._open(event, at_s)
            case ClientAsked(client=client):
                self._ask(client, at_s)
            case UpdateAccepted(client=client):
                self._answer(client, at_s)
            case SumAccepted(clients=clients):
                for client in clients:
                    self._answer(client, at_s)
            case ClientLost(client=client, reason=reason):
                self.answers[-1].lost[client] = reason
                self.answers[-1].pending.discard(client)
            case AdapterCommitted():
                return self._commit(at_s)
            case _:
                pass
        return None

    def left_s(self, rounds: int) -> float | None:
        """How long so many more rounds take, by the middle one of the newest; None before two are known."""
        return rounds * median(self._lengths_s) if len(self._lengths_s) > 1 else None

    def _open(self, event: RoundOpened, at_s: float | None) -> None:
        if self.began_s is None:
            self.began_s = at_s
        if not event.attempt:
            self.answers.append(Answers(event.round))
            self._opened_s = at_s
        for client in event.cohort:
            if event.max_staleness is not None and client in self._asked_s:
                self.answers[-1].pending.add(client)  # still at work for an earlier round
            elif client not in self.answers[-1].took_s:
                self._ask(client, at_s)

    def _ask(self, client: str, at_s: float | None) -> None:
        self._asked_s[client] = at_s
        self.answers[-1].pending.add(client)
        self.answers[-1].lost.pop(client, None)  # it was asked again

    def _answer(self, client: str, at_s: float | None) -> None:
        self.answers[-1].took_s[client] = _between(self._asked_s.pop(client, None), at_s)
        self.answers[-1].pending.discard(client)

    def _commit(self, at_s: float | None) -> float | None:
        length_s = _between(self._opened_s, at_s)
        self.ended_s = at_s
        if length_s is not None:
            self._lengths_s.append(length_s)
        return length_s


def _between(first_s: float | None, last_s: float | None) -> float | None:
    """Seconds from one to the other; None if either is not known, or the clock was set back between them."""
    return None if first_s is None or last_s is None or last_s < first_s else last_s - first_s
