"""Bulyan (El Mhamdi et al., ICML 2018, arXiv 1802.07927)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Update
from fedloom.strategies.robust.coordinate import by_coordinate
from fedloom.strategies.robust.distances import squared_distances
from fedloom.strategies.robust.krum import scores
from fedloom.strategies.robust.rule import Robust, Rule, named

__all__ = ["BULYAN", "bulyan"]

Float64 = npt.NDArray[np.float64]


def bulyan(num_byzantine: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Choose n - 2 num_byzantine updates by repeated Krum, then blend each coordinate from the values near its median.

    The paper's rule over Krum. Each choice scores the updates that are left, by squared product distances as in
    `krum`. With f = `num_byzantine` and t chosen values of a coordinate, the t - 2 f closest to their median are
    averaged. That last step is by coordinates: an inner strategy that trains both factors of a pair is refused. Needs
    4 f + 3 updates, counts each once whatever its weight, and keeps them all in memory.

    Args:
        num_byzantine: False updates to bear, at least 1.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(BULYAN, num_byzantine, inner, train_head)


def _bulyan(schema: Schema, updates: Sequence[Update], num_byzantine: int) -> Tensors:
    chosen = _selected(squared_distances(schema, updates), num_byzantine)
    kept = len(chosen) - 2 * num_byzantine

    def blend(values: Float64) -> Float64:
        off = np.abs(values - np.median(values, axis=0))
        nearest = np.argsort(off, axis=0, kind="stable")[:kept]
        return np.asarray(np.take_along_axis(values, nearest, axis=0).mean(axis=0))

    return by_coordinate([updates[index] for index in chosen], blend)


def _selected(distances: Float64, num_byzantine: int) -> list[int]:
    """Indices of the n - 2 num_byzantine updates that Krum takes one after another, ascending."""
    left = list(range(len(distances)))
    chosen: list[int] = []
    for _ in range(len(distances) - 2 * num_byzantine):
        among = distances[np.ix_(left, left)]
        # Towards the end one neighbour is left to score by, and two updates that are each other's always tie.
        best = left[int(np.lexsort((among.sum(axis=1), scores(among, num_byzantine)))[0])]
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


BULYAN = Rule("Bulyan", _bulyan, per_faulty=4, plus=3, by_coordinate=True)
