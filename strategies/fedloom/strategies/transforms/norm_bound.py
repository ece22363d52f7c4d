"""A bound on every update's norm (Sun et al., 2019, arXiv 1911.07963) around any strategy."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.strategies.api import State, Strategy, Traits, Update
from fedloom.strategies.transforms.transform import Transform, named

__all__ = ["NormBound", "norm"]


@dataclass(frozen=True)
class NormBound(Transform):
    """Scale every update that is longer than M down to M before another strategy folds it.

    The norm is over all trained tensors together, as one vector: d min(1, M / |d|). No client moves the sum further
    than M times its weight, whatever it sends. A pair's factors are scaled as they are sent, relative to the broadcast
    all clients share; where both move, the product's change is bounded too, though not scaled by the same factor.

    Weights are the inner strategy's: with `weighting = "examples"` a client that declares many examples still counts
    for many. The result depends on each update by itself, so neither secure aggregation nor user-level privacy, which
    clips by its own norm, takes it.

    Args:
        inner: Any strategy that does not remember clients by their changes.
        bound: M, positive and finite.

    Raises:
        ConfigError: `bound` is not, or the inner strategy will not do.
    """

    inner: Strategy
    bound: float

    def __post_init__(self) -> None:
        """Refuse a bound that is none."""
        if not 0 < self.bound < math.inf:
            raise ConfigError(f"norm bound is {self.bound!r}; set a positive finite number")
        if self.inner.traits.remembers_clients:
            raise ConfigError(
                f"strategy {named(self.inner)} reads a client's gradient off its change, which a norm bound "
                "scales; leave strategy.norm_bound out, rounds.max_update_norm refuses longer updates instead"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, but that the mean of the updates is not enough."""
        return replace(self.inner.traits, linear=False)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """Let the inner strategy fold the update at no more than the bound.

        Raises:
            SchemaError: See the inner strategy.
            UpdateRejected: Likewise; scaling leaves NaN and Inf for it to refuse.
        """
        return self.inner.fold(state, acc, self._bounded(update))

    def _bounded(self, update: Update) -> Update:
        length = norm(update)
        if not self.bound < length < math.inf:
            return update
        factor = self.bound / length
        scaled = ((name, np.multiply(each, factor, dtype=np.float64)) for name, each in update.delta.items())
        delta = {name: each.astype(np.float32) for name, each in scaled}
        return replace(update, delta=delta, noise_std=factor * update.noise_std)


def norm(update: Update) -> float:
    """L2 norm of the update's change, all its tensors as one vector; finite for every finite float32."""
    return math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in update.delta.values()))
