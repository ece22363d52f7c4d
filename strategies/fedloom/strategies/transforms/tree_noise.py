"""The binary tree behind DP-FTRL's noise (Kairouz et al., ICML 2021, arXiv 2103.00039).

Rounds are leaves, and a node stands for the rounds below it. The sum of rounds 1 to t is a sum over the nodes
of t's binary digits, one noise for each, so that it carries at most log2(t) + 1 noises instead of t. A strategy
that adds increments gets the noise of its prefix sums differenced: in round t the node that ends there enters
and those it swallows leave. Only left children are ever needed, and only they count for the sensitivity.
This is the plain tree of Dwork et al. (STOC 2010), without Honaker's estimator over both children.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["retired", "sensitivity"]

Floats = npt.NDArray[np.float64]


def retired(round: int) -> int:
    """How many of the newest live nodes leave when `round` (from 0) ends: the trailing ones of its binary digits.

    >>> [retired(round) for round in range(8)]
    [0, 1, 0, 2, 0, 1, 0, 3]
    """
    return (round ^ (round + 1)).bit_length() - 1


@lru_cache(maxsize=4096)
def sensitivity(rounds: int, participations: int) -> float:
    """The most that one client can move all node sums together, in L2 and in units of its clip norm.

    The largest of sqrt(sum over nodes of n_v squared) over all ways to take part in `participations` of the rounds,
    n_v being the rounds below node v among them. Contributions that point the same way are the worst ones, since
    nodes add with positive signs. Exact, by dynamic programming over the tree; for one participation it is
    sqrt(floor(log2 rounds) + 1).

    Args:
        rounds: Rounds that have ended, at least 0.
        participations: Most rounds one client is part of, at least 0; more than `rounds` counts as all of them.
    """
    limit = min(rounds, participations)
    if limit == rounds:
        return math.sqrt(sum(_all_rounds(level) for level in _levels(rounds)))
    best = np.zeros(1)
    for level in _levels(rounds):
        best = _joined(best, _left(level, limit), limit)
    return math.sqrt(best[limit])


def _levels(rounds: int) -> list[int]:
    """Heights of the complete trees that `rounds` leaves fall into: the digits of `rounds`."""
    return [level for level in range(rounds.bit_length()) if rounds >> level & 1]


def _all_rounds(level: int) -> int:
    """Sum of squared sizes of the left children in a complete tree, the root being one.

    Level i below the top has 2**(level - i) nodes of size 2**i, half of them left ones.
    """
    return (1 << 2 * level) + sum(1 << (level - i - 1) + 2 * i for i in range(level))


@lru_cache(maxsize=64)
def _left(level: int, limit: int) -> Floats:
    """The largest sum over a complete tree whose root counts, by number of participations, up to `limit`."""
    below = _below(level, limit)
    return below + np.arange(len(below)) ** 2.0


@lru_cache(maxsize=64)
def _below(level: int, limit: int) -> Floats:
    """The same without the root: a right child, whose own sum is never released."""
    return np.zeros(2) if level == 0 else _joined(_left(level - 1, limit), _below(level - 1, limit), limit)


def _joined(one: Floats, two: Floats, limit: int) -> Floats:
    """The best of both together for every number of participations: the max-plus convolution, cut at `limit`."""
    best = np.full(min(len(one) + len(two) - 1, limit + 1), -np.inf)
    for taken, value in enumerate(one[: len(best)]):
        part = best[taken : taken + len(two)]
        np.maximum(part, value + two[: len(part)], out=part)
    return best
