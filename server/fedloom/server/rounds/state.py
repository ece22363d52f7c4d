"""The round as a pure state machine: events in, state out. What happens next is decided in `scheduling`.

::

    RunCreated -> RoundOpened -> UpdateAccepted | ClientLost ... -> RoundClosed -> AdapterCommitted -> RoundOpened ...

Under secure aggregation one SumAccepted, of several clients, takes the place of every UpdateAccepted of a round.
RunEnded ends a run before its last round.

Whoever decides writes the event down before acting on it, so a replay of the log never decides again. A round that can
no longer reach its minimum is opened once more under the same number: updates already accepted stay, and the cohort is
filled up with clients that are live now.

A buffered round (see `buffered`) has no cohort of its own: it opens with those who are still at work for an earlier
one, and a ClientAsked for each that asks for work. An update then counts in the round that is open when it comes.
"""

import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from fedloom.core.errors import StoreError
from fedloom.server.rounds.persistent import PersistentMap

__all__ = [
    "AdapterCommitted",
    "ClientAsked",
    "ClientLost",
    "Event",
    "LostReason",
    "ResultScored",
    "RoundClosed",
    "RoundOpened",
    "Rounds",
    "RunCreated",
    "RunEnded",
    "SumAccepted",
    "UpdateAccepted",
    "apply",
    "event_from_json",
    "event_to_json",
    "told",
]

LostReason = Literal["left", "lease", "rejected"]
Phase = Literal["new", "idle", "open", "closed", "over"]


@dataclass(frozen=True)
class RunCreated:
    """The log begins: the run's random name, what was agreed, and the strategy's first state."""

    run: str
    spec: str
    """Digest of the spec, [strategy] and [user_level]; a restart under another one is refused."""
    schema: str
    """Digest of the adapter's schema."""
    state: str
    """Digest of the strategy state before the first round."""


@dataclass(frozen=True)
class RoundOpened:
    """These clients are asked to train from this state."""

    round: int
    attempt: int
    """0 at first; one higher each time the same round is opened again."""
    state: str
    """Digest of the strategy state the round starts from."""
    cohort: tuple[str, ...]
    deadline_s: float
    """Seconds after the opening (or after the coordinator's restart) at which the round may close early."""
    wanted: int = 0
    """Updates with which the round closes at once; 0 waits for the whole cohort."""
    max_staleness: int | None = None
    """A buffered round takes updates made for this many rounds before it, or fewer; None: only its own."""


@dataclass(frozen=True)
class ClientAsked:
    """In a buffered round, this client is asked to train from its state."""

    round: int
    client: str


@dataclass(frozen=True)
class UpdateAccepted:
    """An update is durable and will be folded."""

    round: int
    """The round it was made for; a buffered round may be a later one."""
    client: str
    digest: str
    weight: float
    score: tuple[float, ...] = ()
    """What the client's evaluation released with it; no round depends on it but through `Update.metrics`."""
    noise_std: float = 0.0


@dataclass(frozen=True)
class SumAccepted:
    """The mean of these clients' updates is durable and will be folded; none of them was ever seen by itself."""

    round: int
    clients: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class ClientLost:
    """The round no longer waits for this client."""

    round: int
    client: str
    reason: LostReason


@dataclass(frozen=True)
class RoundClosed:
    """Exactly these updates are folded, in this order."""

    round: int
    clients: tuple[str, ...]
    reason: Literal["complete", "deadline"]


@dataclass(frozen=True)
class AdapterCommitted:
    """The round is over and this is the next strategy state."""

    round: int
    state: str


@dataclass(frozen=True)
class RunEnded:
    """The run ends before its last round, with what is committed."""

    round: int
    """The round that is not committed any more."""
    reason: Literal["short", "told"]
    """It has waited too long for clients, or an operator said so."""


@dataclass(frozen=True)
class ResultScored:
    """A client's evaluation of the model that the run ended with; nothing is decided by it."""

    round: int
    """How many rounds are committed."""
    client: str
    score: tuple[float, ...]


Event = (
    RunCreated
    | RoundOpened
    | ClientAsked
    | UpdateAccepted
    | SumAccepted
    | ClientLost
    | RoundClosed
    | AdapterCommitted
    | RunEnded
    | ResultScored
)

_EVENTS: dict[str, Any] = {each.__name__: each for each in get_args(Event)}


@dataclass(frozen=True)
class Rounds:
    """Where a run stands: the fold of its log. A value that never changes: any thread may look at it."""

    phase: Phase = "new"
    created: RunCreated | None = None
    round: int = 0
    """The round that is open or comes next; equal to the number of committed rounds."""
    attempt: int = 0
    state: str = ""
    """Digest of the last committed strategy state."""
    cohort: Set[str] = frozenset()
    deadline_s: float = 0.0
    wanted: int = 0
    max_staleness: int | None = None
    starts: PersistentMap[int] = field(default_factory=PersistentMap)
    """In buffered rounds, the round each member of the cohort was last asked for."""
    updates: PersistentMap[UpdateAccepted] = field(default_factory=PersistentMap)
    lost: PersistentMap[LostReason] = field(default_factory=PersistentMap)
    unanswered: int = 0
    """How many are `pending`."""
    sum: str = ""
    """Digest of the mean of all `updates`, where only that is known."""
    folding: tuple[str, ...] = ()
    """Clients whose updates are folded, in order, once the round is closed."""
    scored: PersistentMap[tuple[float, ...]] = field(default_factory=PersistentMap)
    """What clients have released of the model that the run ended with."""

    @property
    def pending(self) -> Set[str]:
        """Cohort members the open round still waits for."""
        return _Pending(self)

    @property
    def rejected(self) -> frozenset[str]:
        """Clients whose update was refused; the round will not take another from them."""
        return frozenset(client for client, reason in self.lost.items() if reason == "rejected")

    @property
    def next(self) -> int:
        """The round that is open or comes next: while one is being committed, the one after it."""
        return self.round + (self.phase == "closed")

    @property
    def oldest(self) -> int:
        """The oldest round whose updates are taken: whoever trains for an earlier one trains for nothing.

        Between two rounds nobody trains whose update would still be taken, since a buffered round opens at once while
        anybody is at work.
        """
        return max(0, self.next - (self.max_staleness or 0))

    def takes_from(self, client: str) -> bool:
        """Whether the open round still takes an update from this client; one that was lost may come back."""
        asked = self.phase == "open" and client in self.cohort and client not in self.updates
        return asked and self.lost.get(client) != "rejected"

    def over(self, length: int | None) -> bool:
        """Whether no more rounds come in a run of so many; None where that is not known."""
        return self.phase == "over" or (length is not None and self.round >= length)

    def started(self, client: str) -> int:
        """The round this client was asked for last."""
        number: int = self.starts.get(client, self.round)
        return number


class _Pending(Set[str]):
    """A view: nothing is copied, and its length is known."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    @classmethod
    def _from_iterable(cls, clients: Iterable[str]) -> Set[str]:  # type: ignore[override]  # what a sum or difference is
        return frozenset(clients)

    def __contains__(self, client: object) -> bool:
        rounds = self._rounds
        return client in rounds.cohort and client not in rounds.updates and client not in rounds.lost

    def __iter__(self) -> Iterator[str]:
        return (client for client in self._rounds.cohort if client in self)

    def __len__(self) -> int:
        return self._rounds.unanswered


def apply(rounds: Rounds, event: Event) -> Rounds:
    """The state after one more event.

    Raises:
        StoreError: The event cannot follow; the log is damaged or was written by something else.
    """
    match event:
        case UpdateAccepted(client=client):
            _expect(rounds.takes_from(client) and event.round == rounds.started(client), rounds, event)
            updates, lost = rounds.updates.put(client, event), rounds.lost.drop(client)
            return _after(rounds, updates=updates, lost=lost, unanswered=rounds.unanswered - (lost is rounds.lost))
        case RunCreated():
            _expect(rounds.phase == "new", rounds, event)
            return _after(rounds, phase="idle", created=event, state=event.state)
        case RoundOpened():
            return _opened(rounds, event)
        case ClientAsked(client=client):
            _expect(rounds.phase == "open" and event.round == rounds.round, rounds, event)
            _expect(rounds.max_staleness is not None and client not in rounds.updates, rounds, event)
            _expect(rounds.lost.get(client) != "rejected", rounds, event)
            starts, more = rounds.starts.put(client, event.round), client not in rounds.pending
            lost, unanswered = rounds.lost.drop(client), rounds.unanswered + more
            return _after(rounds, cohort=starts.keys(), starts=starts, lost=lost, unanswered=unanswered)
        case SumAccepted(clients=clients, digest=digest):
            fits = rounds.phase == "open" and event.round == rounds.round and not rounds.updates
            _expect(fits and len(clients) > 0 and rounds.cohort >= set(clients), rounds, event)
            updates = PersistentMap((client, UpdateAccepted(rounds.round, client, digest, 1.0)) for client in clients)
            lost, unanswered = rounds.lost.only(rounds.lost.keys() - set(clients)), len(rounds.pending - set(clients))
            return _after(rounds, updates=updates, lost=lost, unanswered=unanswered, sum=digest)
        case ClientLost(client=client):
            _expect(rounds.phase == "open" and event.round == rounds.round, rounds, event)
            _expect(client in rounds.cohort and client not in rounds.updates, rounds, event)
            unanswered = rounds.unanswered - (client not in rounds.lost)
            return _after(rounds, lost=rounds.lost.put(client, event.reason), unanswered=unanswered)
        case RoundClosed():
            _expect(rounds.phase == "open" and event.round == rounds.round, rounds, event)
            _expect(len(event.clients) > 0 and event.clients == tuple(sorted(rounds.updates)), rounds, event)
            return _after(rounds, phase="closed", folding=event.clients)
        case RunEnded() | ResultScored():
            return _ended(rounds, event)
        case AdapterCommitted():
            _expect(rounds.phase == "closed" and event.round == rounds.round, rounds, event)
            return _next(rounds, event)


def _after(rounds: Rounds, **changes: Any) -> Rounds:
    """The value with these fields changed: `dataclasses.replace`, several times as fast."""
    after = object.__new__(Rounds)
    after.__dict__.update(rounds.__dict__, **changes)
    return after


def _opened(rounds: Rounds, event: RoundOpened) -> Rounds:
    again, buffered = rounds.phase == "open", event.max_staleness is not None
    _expect(rounds.phase == "idle" or (again and rounds.updates.keys() <= set(event.cohort)), rounds, event)
    _expect((event.round, event.state) == (rounds.round, rounds.state), rounds, event)
    _expect(event.attempt == (rounds.attempt + 1 if again else 0), rounds, event)
    _expect(not buffered or (not again and rounds.starts.keys() >= set(event.cohort)), rounds, event)
    cohort = frozenset(event.cohort)
    lost = rounds.lost.only(cohort if buffered else rounds.rejected)
    return _after(
        rounds,
        phase="open",
        attempt=event.attempt,
        cohort=cohort,
        deadline_s=event.deadline_s,
        wanted=event.wanted,
        max_staleness=event.max_staleness,
        starts=rounds.starts.only(cohort if buffered else ()),
        lost=lost,
        unanswered=len(cohort - rounds.updates.keys() - lost.keys()),
    )


def _ended(rounds: Rounds, event: RunEnded | ResultScored) -> Rounds:
    phases = ("idle", "open") if isinstance(event, RunEnded) else ("idle", "over")
    _expect(rounds.phase in phases and event.round == rounds.round > 0, rounds, event)
    if isinstance(event, RunEnded):
        return Rounds(phase="over", created=rounds.created, round=rounds.round, state=rounds.state)
    _expect(event.client not in rounds.scored, rounds, event)
    return _after(rounds, scored=rounds.scored.put(event.client, event.score))


def _next(rounds: Rounds, event: AdapterCommitted) -> Rounds:
    left = rounds.cohort - rounds.updates.keys() - rounds.rejected if rounds.starts else frozenset()
    return Rounds(
        phase="idle",
        created=rounds.created,
        round=rounds.round + 1,
        state=event.state,
        starts=rounds.starts.only(left),
        lost=rounds.lost.only(left),
    )


def event_to_json(event: Event) -> str:
    """One row of the log."""
    # Without what has no value: so write builds that do not know of it.
    document = {name: value for name, value in vars(event).items() if value or name not in ("score", "noise_std")}
    return json.dumps({"event": type(event).__name__, **document}, separators=(",", ":"))


def event_from_json(text: str) -> Event:
    """Read what `event_to_json` wrote.

    Raises:
        StoreError: The row is not an event of this build.
    """
    try:
        document = json.loads(text)
        kind = _EVENTS[document.pop("event")]
        # A field with a default is one that an earlier version did not write.
        given = [each.name for each in fields(kind) if each.name in document or each.default is MISSING]
        values = {name: document.pop(name) for name in given}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"event log row {text[:80]!r} is not an event of this version: {error!r}") from error
    if document:
        raise StoreError(f"event log row {text[:80]!r} has unknown fields; run the version that wrote it")
    event: Event = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    return event


def told(event: Event) -> str:
    """An event for people, who count rounds from 1.

    >>> told(ClientLost(0, "ann", "lease"))
    "round 1: ClientLost(client='ann', reason='lease')"
    """
    about = [f"{each.name}={getattr(event, each.name)!r}" for each in fields(event) if each.name != "round"]
    number = "" if isinstance(event, RunCreated) else f"round {event.round + 1}: "
    return f"{number}{type(event).__name__}({', '.join(about)})"


def _expect(fits: bool, rounds: Rounds, event: Event) -> None:
    if not fits:
        raise StoreError(
            f"event log: {type(event).__name__} cannot follow in round {rounds.round + 1}, phase {rounds.phase}; "
            "the log is damaged, restore the state directory from a backup"
        )
