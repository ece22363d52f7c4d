"""Bulyan (El Mhamdi et al., ICML 2018, arXiv 1802.07927)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedloom.proto.schema import Schema, Tensors
from fedloom.strategies.api import Update
from fedloom.strategies.coordinate import by_coordinate
from fedloom.strategies.distances import squared_distances
from fedloom.strategies.krum import scores
from fedloom.strategies.robust import Robust, Rule, named

__all__ = ["BULYAN", "bulyan"]

Float64 = npt.NDArray[np.float64]


def bulyan(faulty: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Choose n - 2 faulty updates by repeated Krum, then blend each coordinate from the values near its median.

    The paper's rule over Krum. Each choice scores the updates that are left, by squared product distances as in
    `krum`. Of the t chosen values of a coordinate, the t - 2 faulty closest to their median are averaged. That last
    step is by coordinates: an inner strategy that trains both factors of a pair is refused. Needs 4 faulty + 3 updates,
    counts each once whatever its weight, and keeps them all in memory.

    Args:
        faulty: False updates to bear, at least 1.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(BULYAN, faulty, inner, train_head)


def _bulyan(schema: Schema, updates: Sequence[Update], faulty: int) -> Tensors:
    chosen = _selected(squared_distances(schema, updates), faulty)
    kept = len(chosen) - 2 * faulty

    def blend(values: Float64) -> Float64:
        off = np.abs(values - np.median(values, axis=0))
        nearest = np.argsort(off, axis=0, kind="stable")[:kept]
        return np.asarray(np.take_along_axis(values, nearest, axis=0).mean(axis=0))

    return by_coordinate([updates[index] for index in chosen], blend)


def _selected(distances: Float64, faulty: int) -> list[int]:
    """Indices of the n - 2 faulty updates that Krum takes one after another, ascending."""
    left = list(range(len(distances)))
    chosen: list[int] = []
    for _ in range(len(distances) - 2 * faulty):
        among = distances[np.ix_(left, left)]
        # Towards the end one neighbour is left to score by, and two updates that are each other's always tie.
        best = left[int(np.lexsort((among.sum(axis=1), scores(among, faulty)))[0])]
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


BULYAN = Rule("Bulyan", _bulyan, per_faulty=4, plus=3, by_coordinate=True)
