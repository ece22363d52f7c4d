"""The round as a pure state machine: events in, state out; decisions from state and numbers, never from a clock.

::

    RunCreated -> RoundOpened -> UpdateAccepted | ClientLost ... -> RoundClosed -> AdapterCommitted -> RoundOpened ...

Under secure aggregation one SumAccepted, of several clients, takes the place of every UpdateAccepted of a round.

Whoever decides writes the event down before acting on it, so a replay of the log never decides again.
A round that can no longer reach its minimum is opened once more under the same number: updates already
accepted stay, and the cohort is filled up with clients that are live now.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from fedloom.proto.errors import StoreError
from fedloom.proto.run import RoundsSection, RunConfig

__all__ = [
    "AdapterCommitted",
    "ClientLost",
    "Event",
    "LostReason",
    "RoundClosed",
    "RoundOpened",
    "Rounds",
    "RunCreated",
    "SumAccepted",
    "UpdateAccepted",
    "apply",
    "closing",
    "decision",
    "draw_cohort",
    "event_from_json",
    "event_to_json",
    "opening",
    "reopening",
]

LostReason = Literal["left", "lease", "rejected"]
Phase = Literal["new", "idle", "open", "closed"]

_COHORT_STREAM = 0x636F686F7274
"""Top word of the Philox counter of cohort draws, so that they never share numbers with a strategy's draws."""


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


@dataclass(frozen=True)
class UpdateAccepted:
    """An update is durable and will be folded."""

    round: int
    client: str
    digest: str
    weight: float


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


Event = RunCreated | RoundOpened | UpdateAccepted | SumAccepted | ClientLost | RoundClosed | AdapterCommitted

_EVENTS: dict[str, Any] = {each.__name__: each for each in get_args(Event)}


@dataclass(frozen=True)
class Rounds:
    """Where a run stands: the fold of its log."""

    phase: Phase = "new"
    created: RunCreated | None = None
    round: int = 0
    """The round that is open or comes next; equal to the number of committed rounds."""
    attempt: int = 0
    state: str = ""
    """Digest of the last committed strategy state."""
    cohort: frozenset[str] = frozenset()
    deadline_s: float = 0.0
    updates: Mapping[str, UpdateAccepted] = field(default_factory=lambda: MappingProxyType({}))
    lost: Mapping[str, LostReason] = field(default_factory=lambda: MappingProxyType({}))
    sum: str = ""
    """Digest of the mean of all `updates`, where only that is known."""
    folding: tuple[str, ...] = ()
    """Clients whose updates are folded, in order, once the round is closed."""

    @property
    def pending(self) -> frozenset[str]:
        """Cohort members the open round still waits for."""
        return self.cohort - self.updates.keys() - self.lost.keys()

    @property
    def rejected(self) -> frozenset[str]:
        """Clients whose update was refused; the round will not take another from them."""
        return frozenset(client for client, reason in self.lost.items() if reason == "rejected")


def apply(rounds: Rounds, event: Event) -> Rounds:
    """The state after one more event.

    Raises:
        StoreError: The event cannot follow; the log is damaged or was written by something else.
    """
    match event:
        case RunCreated():
            _expect(rounds.phase == "new", rounds, event)
            return replace(rounds, phase="idle", created=event, state=event.state)
        case RoundOpened():
            again = rounds.phase == "open"
            _expect(rounds.phase == "idle" or (again and rounds.updates.keys() <= set(event.cohort)), rounds, event)
            _expect((event.round, event.state) == (rounds.round, rounds.state), rounds, event)
            _expect(event.attempt == (rounds.attempt + 1 if again else 0), rounds, event)
            rejected: dict[str, LostReason] = {client: "rejected" for client in rounds.rejected}
            return replace(
                rounds,
                phase="open",
                attempt=event.attempt,
                cohort=frozenset(event.cohort),
                deadline_s=event.deadline_s,
                lost=MappingProxyType(rejected),
            )
        case UpdateAccepted(client=client):
            _expect(_open(rounds, event) and client not in rounds.updates.keys() | rounds.rejected, rounds, event)
            lost = {other: reason for other, reason in rounds.lost.items() if other != client}
            updates = {**rounds.updates, client: event}
            return replace(rounds, updates=MappingProxyType(updates), lost=MappingProxyType(lost))
        case SumAccepted(clients=clients, digest=digest):
            fits = rounds.phase == "open" and event.round == rounds.round and not rounds.updates
            _expect(fits and len(clients) > 0 and rounds.cohort.issuperset(clients), rounds, event)
            updates = {client: UpdateAccepted(rounds.round, client, digest, 1.0) for client in clients}
            lost = {other: reason for other, reason in rounds.lost.items() if other not in updates}
            return replace(rounds, updates=MappingProxyType(updates), lost=MappingProxyType(lost), sum=digest)
        case ClientLost(client=client):
            _expect(_open(rounds, event) and client not in rounds.updates, rounds, event)
            return replace(rounds, lost=MappingProxyType({**rounds.lost, client: event.reason}))
        case RoundClosed():
            _expect(rounds.phase == "open" and event.round == rounds.round, rounds, event)
            _expect(len(event.clients) > 0 and event.clients == tuple(sorted(rounds.updates)), rounds, event)
            return replace(rounds, phase="closed", folding=event.clients)
        case AdapterCommitted():
            _expect(rounds.phase == "closed" and event.round == rounds.round, rounds, event)
            return Rounds(phase="idle", created=rounds.created, round=rounds.round + 1, state=event.state)


def opening(
    rounds: Rounds, live: Collection[str], config: RoundsSection, *, seed: int, needed: int
) -> RoundOpened | None:
    """The decision to open the next round, or None while fewer than `needed` clients are live.

    Args:
        rounds: Where the run stands.
        live: Clients that have asked for work and whose lease has not lapsed.
        config: When a round opens.
        seed: The run's seed.
        needed: Clients that must be live, at least `config.min_clients`.
    """
    if rounds.phase != "idle" or len(live) < needed:
        return None
    cohort = draw_cohort(live, config.clients_per_round, seed=seed, round=rounds.round)
    return RoundOpened(rounds.round, 0, rounds.state, cohort, config.deadline_s)


def closing(rounds: Rounds, min_clients: int, elapsed_s: float) -> RoundClosed | None:
    """The decision to close the open round: everybody has answered, or the deadline has passed; None otherwise.

    Args:
        rounds: Where the run stands.
        min_clients: Updates without which a round is never closed.
        elapsed_s: Seconds since the round was opened.
    """
    if rounds.phase != "open" or len(rounds.updates) < min_clients:
        return None
    complete = not rounds.pending or bool(rounds.sum)
    if not complete and elapsed_s < rounds.deadline_s:
        return None
    reason: Literal["complete", "deadline"] = "complete" if complete else "deadline"
    return RoundClosed(rounds.round, tuple(sorted(rounds.updates)), reason)


def reopening(
    rounds: Rounds, live: Collection[str], config: RoundsSection, *, seed: int, elapsed_s: float
) -> RoundOpened | None:
    """The decision to open the same round again because it is short of updates, or None.

    It is short when those it still waits for are too few, or the deadline has passed, and it is opened again
    as soon as live clients that it does not wait for make up the minimum. A client whose update was
    refused in this round is not asked again: it would resend the same bytes.

    Args:
        rounds: Where the run stands.
        live: Clients that have asked for work and whose lease has not lapsed.
        config: When a round opens.
        seed: The run's seed.
        elapsed_s: Seconds since the round was opened.
    """
    have = len(rounds.updates)
    if rounds.phase != "open" or have >= config.min_clients:
        return None
    if have + len(rounds.pending) >= config.min_clients and elapsed_s < rounds.deadline_s:
        return None
    candidates = frozenset(live) - rounds.updates.keys() - rounds.rejected
    if candidates <= rounds.pending or have + len(candidates) < config.min_clients:
        return None
    size = None if config.clients_per_round is None else config.clients_per_round - have
    fresh = draw_cohort(candidates, size, seed=seed, round=rounds.round, attempt=rounds.attempt + 1)
    cohort = tuple(sorted({*rounds.updates, *fresh}))
    return RoundOpened(rounds.round, rounds.attempt + 1, rounds.state, cohort, config.deadline_s)


def decision(
    rounds: Rounds, live: Collection[str], config: RunConfig, elapsed_s: float, expect: int = 0
) -> RoundClosed | RoundOpened | None:
    """The next decision that is due, or None.

    Args:
        rounds: Where the run stands.
        live: Clients that have asked for work and whose lease has not lapsed.
        config: The run file.
        elapsed_s: Seconds since the round was opened.
        expect: Clients that must be live before the very first round opens, if more than the minimum.
    """
    if rounds.phase == "open":
        closed = closing(rounds, config.rounds.min_clients, elapsed_s)
        return closed or reopening(rounds, live, config.rounds, seed=config.run.seed, elapsed_s=elapsed_s)
    if rounds.round >= config.run.rounds:
        return None
    needed = max(config.rounds.min_clients, expect if rounds.round == 0 else 0)
    return opening(rounds, live, config.rounds, seed=config.run.seed, needed=needed)


def draw_cohort(
    clients: Collection[str], size: int | None, *, seed: int, round: int, attempt: int = 0
) -> tuple[str, ...]:
    """`size` of the clients, sorted by name; all of them when `size` is None or not less than their number.

    A function of the set of clients and the numbers alone.

    >>> draw_cohort({"b", "c", "a"}, 2, seed=1, round=0) == draw_cohort(["a", "b", "c"], 2, seed=1, round=0)
    True
    """
    names = sorted(clients)
    if size is None or size >= len(names):
        return tuple(names)
    philox = np.random.Philox(key=[seed, round], counter=[0, 0, attempt, _COHORT_STREAM])
    chosen = np.random.Generator(philox).choice(len(names), size, replace=False)
    return tuple(names[index] for index in sorted(chosen))


def event_to_json(event: Event) -> str:
    """One row of the log."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}, separators=(",", ":"))


def event_from_json(text: str) -> Event:
    """Read what `event_to_json` wrote.

    Raises:
        StoreError: The row is not an event of this build.
    """
    try:
        document = json.loads(text)
        kind = _EVENTS[document.pop("event")]
        values = {each.name: document.pop(each.name) for each in fields(kind)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"event log row {text[:80]!r} is not an event of this version: {error!r}") from error
    if document:
        raise StoreError(f"event log row {text[:80]!r} has unknown fields; run the version that wrote it")
    event: Event = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    return event


def _open(rounds: Rounds, event: UpdateAccepted | ClientLost) -> bool:
    return rounds.phase == "open" and event.round == rounds.round and event.client in rounds.cohort


def _expect(fits: bool, rounds: Rounds, event: Event) -> None:
    if not fits:
        raise StoreError(
            f"event log: {type(event).__name__} cannot follow in round {rounds.round}, phase {rounds.phase}; "
            "the log is damaged, restore the state directory from a backup"
        )
