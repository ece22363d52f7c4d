"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Update
from fedloom.strategies.robust.coordinate import by_coordinate
from fedloom.strategies.robust.distances import squared_distances
from fedloom.strategies.robust.rule import Robust, Rule, named

__all__ = ["KRUM", "MULTI_KRUM", "krum", "multi_krum", "scores"]

Float64 = npt.NDArray[np.float64]


def krum(num_byzantine: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Take the one update with the smallest sum of squared distances to its n - f - 2 nearest, and no other.

    Distances are between models, over products of the pairs and not their factors
    (see `distances`), so an inner strategy that trains both factors is fine: the model becomes the
    chosen client's, exactly. One client's data decide a round, which costs accuracy where clients differ. Needs
    2 num_byzantine + 3 updates, counts each once whatever its weight, and keeps them all in memory.

    Args:
        num_byzantine: False updates to bear, at least 1.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(KRUM, num_byzantine, inner, train_head)


def multi_krum(num_byzantine: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Average the n - num_byzantine updates with the smallest Krum scores, and commit as `inner` does.

    The paper's m is n - num_byzantine. The choice is by products and free of gauge as with `krum`. The average is
    the inner strategy's: exact with one factor at rest, with the cross term of `fedavg` where both move. Needs
    2 num_byzantine + 3 updates, counts each once whatever its weight, and keeps them all in memory.

    Args:
        num_byzantine: False updates to bear, at least 1.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(MULTI_KRUM, num_byzantine, inner, train_head)


def scores(distances: Float64, num_byzantine: int) -> Float64:
    """For every update the sum of squared distances to its nearest n - num_byzantine - 2 others, at least one.

    Args:
        distances: Squared, shape (n, n) with n from 2.
        num_byzantine: False updates to bear.

    >>> points = np.array([0.0, 1.0, 2.0, 9.0, 1.5])
    >>> scores((points[:, None] - points) ** 2, 1).tolist()
    [3.25, 1.25, 1.25, 105.25, 0.5]
    """
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    nearest = max(1, len(distances) - num_byzantine - 2)
    total: Float64 = np.sort(others, axis=1)[:, :nearest].sum(axis=1)
    return total


def _krum(schema: Schema, updates: Sequence[Update], num_byzantine: int) -> Tensors:
    return updates[int(np.argmin(scores(squared_distances(schema, updates), num_byzantine)))].delta


def _multi_krum(schema: Schema, updates: Sequence[Update], num_byzantine: int) -> Tensors:
    order = np.argsort(scores(squared_distances(schema, updates), num_byzantine), kind="stable")
    chosen = [updates[index] for index in sorted(order[: len(updates) - num_byzantine])]
    return by_coordinate(chosen, lambda values: np.asarray(values.mean(axis=0)))


KRUM = Rule("Krum", _krum, per_faulty=2, plus=3, by_coordinate=False)
MULTI_KRUM = Rule("Multi-Krum", _multi_krum, per_faulty=2, plus=3, by_coordinate=False)
