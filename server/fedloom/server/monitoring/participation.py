"""Who took part in how many rounds, and in the newest, read from the event log."""

from collections import Counter
from collections.abc import Iterable

from fedloom.server.rounds.evaluation import Scores
from fedloom.server.rounds.state import ClientAsked, Event, RoundOpened, UpdateAccepted

__all__ = ["Asked", "Attendance", "rounds_asked"]


class Asked:
    """How often each client was asked to train: at least as often as its ledger was charged.

    A round that is opened again asks anew, since a client may have trained before it was lost; only a client whose
    update was already accepted is not asked twice. What a client really did, its own ledger knows.

    Attributes:
        counts: Times asked, by client.
        most: The largest of them.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.most = 0
        self._answered: set[str] = set()
        self._round = -1

    def add(self, event: Event) -> None:
        """Count one more event; give them oldest first."""
        if isinstance(event, UpdateAccepted):
            self._answered.add(event.client)
        elif isinstance(event, ClientAsked):
            self._ask(event.client)
        elif isinstance(event, RoundOpened) and event.max_staleness is None:
            if event.round != self._round:
                self._round, self._answered = event.round, set()
            for client in event.cohort:
                if client not in self._answered:
                    self._ask(client)

    def _ask(self, client: str) -> None:
        self.counts[client] += 1
        self.most = max(self.most, self.counts[client])


class Attendance:
    """What a record of the newest round says of its clients, followed through the log.

    Attributes:
        asked: How often each client was asked so far.
        cohort: Who was asked in the round that was opened last.
        scores: What its clients have scored.
    """

    def __init__(self) -> None:
        self.asked, self.cohort, self.scores = Asked(), set[str](), Scores()

    def add(self, event: Event) -> None:
        """One more event; give them oldest first."""
        self.asked.add(event)
        self.scores.add(event)
        if isinstance(event, RoundOpened):
            self.cohort = set(event.cohort)
        elif isinstance(event, ClientAsked):
            self.cohort.add(event.client)


def rounds_asked(events: Iterable[Event]) -> Counter[str]:
    """How often each client was asked to train, see `Asked`.

    Args:
        events: The log or its beginning, oldest first.
    """
    asked = Asked()
    for event in events:
        asked.add(event)
    return asked.counts
