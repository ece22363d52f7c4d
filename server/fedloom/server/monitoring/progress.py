"""What the coordinator knows about its clients, and what a display may show of a run."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedloom.core.config.run import RunConfig
from fedloom.server.rounds.state import Rounds
from fedloom.server.storage.event_times import Traffic

__all__ = ["Progress", "warn_if_short"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A picture of the run at one moment."""

    run: str
    round: int
    """The round that is open or comes next, from 0; equal to `rounds` when the run is finished."""
    rounds: int
    """Rounds of the whole run."""
    open: bool
    elapsed_s: float
    """Seconds since the round was opened; 0 while none is open."""
    needed: int
    """Updates a round needs."""
    short: bool
    """The open round cannot reach `needed` until another client asks for work."""
    live: tuple[str, ...]
    """Clients that ask for work and whose lease has not lapsed, sorted."""
    cohort: tuple[str, ...]
    submitted: tuple[str, ...]
    lost: Mapping[str, str]
    """Why the round no longer waits for a cohort member: left, lease or rejected."""
    bytes_by_round: Mapping[int, tuple[int, int]]
    bytes_by_client: Mapping[str, tuple[int, int]]
    """(down, up) payload bytes of the whole run."""
    seen_ago: Mapping[str, float]
    """Seconds since the last sign of life of each client that this process knows."""

    over: bool
    """No more rounds come; `round` may be below `rounds`."""
    waiting: str
    """What keeps the run from going on that clients could change, in words; empty if nothing does."""
    waiting_s: float
    refusing: tuple[str, ...]
    """Clients that have said that they refuse the run, and not come back since."""
    codecs: tuple[str, str]
    """Of updates and of what is broadcast."""

    @classmethod
    def of(
        cls,
        rounds: Rounds,
        config: RunConfig,
        live: Iterable[str],
        seen_ago: Mapping[str, float],
        traffic: Traffic,
        elapsed_s: float,
        told: tuple[str, float, tuple[str, ...]] = ("", 0.0, ()),
        codecs: tuple[str, str] = ("", ""),
    ) -> "Progress":
        """The picture of what the arguments say."""
        is_open = rounds.phase == "open"
        needed = config.rounds.min_clients
        return cls(
            run=rounds.created.run if rounds.created else "",
            round=rounds.round,
            rounds=config.run.rounds,
            open=is_open,
            elapsed_s=elapsed_s if is_open else 0.0,
            needed=needed,
            short=is_open and rounds.max_staleness is None and len(rounds.updates) + len(rounds.pending) < needed,
            live=tuple(sorted(live)),
            cohort=tuple(sorted(rounds.cohort)),
            submitted=tuple(sorted(rounds.updates)),
            lost=dict(rounds.lost),
            bytes_by_round=dict(traffic.rounds),
            bytes_by_client=dict(traffic.clients),
            seen_ago=seen_ago,
            over=rounds.over(config.run.rounds),
            waiting=told[0],
            waiting_s=told[1],
            refusing=told[2],
            codecs=codecs,
        )


def warn_if_short(rounds: Rounds, needed: int) -> None:
    """Say in the log when the open round can no longer reach the updates it needs."""
    possible = len(rounds.updates) + len(rounds.pending)
    if possible < needed and rounds.max_staleness is None:
        _log.warning(
            "round %d can reach only %d of the %d updates it needs; it is opened again once enough other "
            "clients ask for work",
            rounds.round + 1,
            possible,
            needed,
        )
