"""Coordinate-wise median and trimmed mean (Yin et al., ICML 2018, arXiv 1803.01498)."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Update
from fedloom.strategies.robust.rule import Robust, Rule, named

__all__ = ["MEDIAN", "TRIMMED_MEAN", "by_coordinate", "median", "trimmed_mean"]

Float64 = npt.NDArray[np.float64]


def median(num_byzantine: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Move every coordinate by the median of the clients' changes (definition 1), and commit as `inner` does.

    With fewer than half of the updates false, each coordinate stays within the honest ones' range. Coordinates of a
    low-rank pair mean something only while one factor rests: an inner strategy that trains both is refused. Needs 2
    num_byzantine + 1 updates, counts each once whatever its weight, and keeps them all in memory.

    Args:
        num_byzantine: False updates to bear, at least 1; it only sets how few updates are too few.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(MEDIAN, num_byzantine, inner, train_head)


def trimmed_mean(num_byzantine: int = 1, inner: str = "ffa", train_head: bool = True) -> Robust:
    """Drop the `num_byzantine` largest and smallest changes of a coordinate, average the rest, commit as `inner` does.

    The paper's beta (definition 2) is f / n here, f being `num_byzantine`: a count, so that it holds in a small round
    too. With at most f updates false, each coordinate stays within the honest ones' range. Coordinates of a low-rank
    pair mean something only while one factor rests: an inner strategy that trains both is refused. Needs 2 f + 1
    updates, counts each once whatever its weight, and keeps them all in memory.

    Args:
        num_byzantine: False updates to bear, at least 1.
        inner: Name of the linear strategy that plans and commits.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or there is no such inner strategy or it is not linear.
    """
    return named(TRIMMED_MEAN, num_byzantine, inner, train_head)


def by_coordinate(updates: Sequence[Update], blend: Callable[[Float64], Float64]) -> dict[str, Float64]:
    """Blend every trained tensor by itself.

    Args:
        updates: At least one, of the same tensors.
        blend: From the changes of all updates, shape (n, ...), to one change of shape (...).
    """
    return {
        name: blend(np.stack([each.delta[name] for each in updates]).astype(np.float64)) for name in updates[0].delta
    }


def _median(schema: Schema, updates: Sequence[Update], num_byzantine: int) -> Tensors:
    return by_coordinate(updates, lambda values: np.asarray(np.median(values, axis=0)))


def _trimmed_mean(schema: Schema, updates: Sequence[Update], num_byzantine: int) -> Tensors:
    kept = slice(num_byzantine, len(updates) - num_byzantine)
    return by_coordinate(updates, lambda values: np.asarray(np.sort(values, axis=0)[kept].mean(axis=0)))


MEDIAN = Rule("coordinate-wise median", _median, per_faulty=2, plus=1, by_coordinate=True)
TRIMMED_MEAN = Rule("trimmed mean", _trimmed_mean, per_faulty=2, plus=1, by_coordinate=True)
