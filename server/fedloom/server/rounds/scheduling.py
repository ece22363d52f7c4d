"""Decisions about rounds, from state and numbers, never from a clock: when one opens, with whom, and when it closes."""

import math
from collections.abc import Collection
from functools import lru_cache
from typing import Literal

import numpy as np

from fedloom.core.config.run import RoundsSection, RunConfig
from fedloom.server.rounds.state import ClientAsked, RoundClosed, RoundOpened, Rounds

__all__ = ["asking", "closing", "cohort_size", "decision", "draw_cohort", "opening", "reopening"]

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
    wanted = config.clients_per_round or 0
    if config.mode == "buffered":
        at_work = (name for name, start in rounds.starts.items() if rounds.round - start <= config.max_staleness)
        cohort = tuple(sorted(at_work))
        return RoundOpened(rounds.round, 0, rounds.state, cohort, config.deadline_s, wanted, config.max_staleness)
    cohort = draw_cohort(live, _size(config), seed=seed, round=rounds.round)
    return RoundOpened(rounds.round, 0, rounds.state, cohort, config.deadline_s, wanted)


def asking(rounds: Rounds, client: str, config: RoundsSection) -> ClientAsked | None:
    """The decision to ask a client that asks for work in a buffered round; None when it is not to be asked now.

    A client has at most one update in a buffer: it is not asked again before that is committed.

    Args:
        rounds: Where the run stands.
        client: Who asks, and therefore has nothing left of what it was asked for before.
        config: How many clients may be at work.
    """
    if rounds.phase != "open" or rounds.max_staleness is None:
        return None
    if client in rounds.updates or rounds.lost.get(client) == "rejected":
        return None
    if client in rounds.pending and rounds.started(client) == rounds.round:
        return None  # it has been asked for this very round, and gets the same answer
    at_work = rounds.unanswered - (client in rounds.pending)
    if config.concurrency is not None and at_work >= config.concurrency:
        return None
    return ClientAsked(rounds.round, client)


def closing(rounds: Rounds, min_clients: int, elapsed_s: float, live: Collection[str] = ()) -> RoundClosed | None:
    """The decision to close the open round; None if it is to go on.

    It closes with the updates that are wanted, when everybody has answered who could, or once the deadline has passed.

    Args:
        rounds: Where the run stands.
        min_clients: Updates without which a round is never closed.
        elapsed_s: Seconds since the round was opened.
        live: Clients that could still be asked in a buffered round.
    """
    if rounds.phase != "open" or len(rounds.updates) < min_clients:
        return None
    complete = bool(rounds.sum) or 0 < rounds.wanted <= len(rounds.updates)
    if not complete and not rounds.unanswered:
        complete = rounds.max_staleness is None or set(live) <= rounds.updates.keys() | rounds.rejected
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
    if rounds.phase != "open" or have >= config.min_clients or rounds.max_staleness is not None:
        return None
    if have + rounds.unanswered >= config.min_clients and elapsed_s < rounds.deadline_s:
        return None
    candidates = frozenset(live) - rounds.updates.keys() - rounds.rejected
    if candidates <= rounds.pending or have + len(candidates) < config.min_clients:
        return None
    attempt, wanted = rounds.attempt + 1, config.clients_per_round or 0
    fresh = draw_cohort(candidates, _size(config, have), seed=seed, round=rounds.round, attempt=attempt)
    cohort = tuple(sorted({*rounds.updates, *fresh}))
    return RoundOpened(rounds.round, attempt, rounds.state, cohort, config.deadline_s, wanted)


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
        closed = closing(rounds, config.rounds.min_clients, elapsed_s, live)
        return closed or reopening(rounds, live, config.rounds, seed=config.run.seed, elapsed_s=elapsed_s)
    if rounds.round >= config.run.rounds:
        return None
    if rounds.round == 0 and not set(live).issuperset(config.rounds.expected):
        return None
    needed = max(config.rounds.min_clients, expect if rounds.round == 0 else 0)
    if rounds.starts:
        needed = 0  # clients are at work for it already
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


@lru_cache(maxsize=64)
def cohort_size(wanted: int, dropout_rate: float, probability: float) -> int:
    """The least number of clients to ask so that at least `wanted` answer with at least this probability.

    Every client fails to answer with probability `dropout_rate`, independently: the tail of a binomial distribution,
    summed exactly as the chance that the last answer needed comes from client j, for j from `wanted` on.

    Args:
        wanted: Answers, at least 1.
        dropout_rate: In [0, 1).
        probability: In (0, 1).

    >>> [cohort_size(wanted, 0.3, 0.999) for wanted in (5, 10, 20, 50, 100)]
    [15, 24, 42, 91, 170]
    >>> [cohort_size(wanted, 0.1, 0.999) for wanted in (5, 10, 20, 50, 100)]
    [9, 16, 29, 65, 124]
    """
    if not dropout_rate:
        return wanted
    asked, log_chance = wanted, wanted * math.log1p(-dropout_rate)
    total = math.exp(log_chance)
    while total < probability:
        log_chance += math.log(dropout_rate * asked / (asked - wanted + 1))
        asked += 1
        total += math.exp(log_chance)
    return asked


def _size(config: RoundsSection, have: int = 0) -> int | None:
    """Clients to ask when `have` updates are there already; None is everybody."""
    if config.clients_per_round is None:
        return None
    return cohort_size(config.clients_per_round - have, config.dropout_rate, config.completion_probability)
