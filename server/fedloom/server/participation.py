"""Who took part in how many rounds, read from the event log."""

from collections import Counter
from collections.abc import Iterable

from fedloom.server.rounds import ClientAsked, Event, RoundOpened, UpdateAccepted

__all__ = ["rounds_asked"]


def rounds_asked(events: Iterable[Event]) -> Counter[str]:
    """How often each client was asked to train: at least as often as its ledger was charged.

    A round that is opened again asks anew, since a client may have trained before it was lost; only a client whose
    update was already accepted is not asked twice. What a client really did, its own ledger knows.

    Args:
        events: The log or its beginning, oldest first.
    """
    asked: Counter[str] = Counter()
    answered: set[tuple[int, str]] = set()
    for event in events:
        if isinstance(event, UpdateAccepted):
            answered.add((event.round, event.client))
        elif isinstance(event, ClientAsked):
            asked[event.client] += 1
        elif isinstance(event, RoundOpened) and event.max_staleness is None:
            asked.update(client for client in event.cohort if (event.round, client) not in answered)
    return asked
