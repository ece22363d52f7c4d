"""Decisions about rounds, from state and numbers, never from a clock: when one opens, with whom, and when it closes."""

from collections.abc import Collection
from typing import Literal

import numpy as np

from fedloom.proto.run import RoundsSection, RunConfig
from fedloom.server.rounds import RoundClosed, RoundOpened, Rounds

__all__ = ["closing", "decision", "draw_cohort", "opening", "reopening"]

_COHORT_STREAM = 0x636F686F7274
"""Top word of the Philox counter of cohort draws, so that they never share numbers with a strategy's draws."""


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
