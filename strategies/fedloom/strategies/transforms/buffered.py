"""Updates from older states count for less, as in FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639)."""

import math
from dataclasses import dataclass, replace
from typing import Any

from fedloom.core.errors import ConfigError
from fedloom.strategies.api import State, Strategy, Traits, Update
from fedloom.strategies.transforms.transform import Transform, named

__all__ = ["Buffered"]


@dataclass(frozen=True)
class Buffered(Transform):
    """Multiply each change by 1 / sqrt(1 + staleness) before another strategy folds it (section 5 of the paper).

    Its weight stays, so the mean is over all alike: with K updates of weight 1, w <- w + 1/K sum_k s_k delta_k.

    Args:
        inner: A linear strategy that trains the same tensors in every round and keeps their coordinates.

    Raises:
        ConfigError: The inner strategy does not.
    """

    inner: Strategy

    def __post_init__(self) -> None:
        """Refuse what an old change does not fit."""
        traits = self.inner.traits
        if traits.rewrites or not (traits.linear and traits.same_tensors):
            raise ConfigError(
                f"strategy {named(self.inner)} cannot use changes made from an older state: it rewrites its "
                "coordinates, trains other tensors in other rounds or is not linear; set rounds.mode = "
                '"synchronous" or choose fedavg, ffa or fedpeft'
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, but that the plain mean is not enough."""
        return replace(self.inner.traits, linear=False)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """Let the inner strategy fold the update, discounted by its age.

        Raises:
            SchemaError: See the inner strategy.
            UpdateRejected: Likewise.
        """
        if update.staleness:
            factor = 1 / math.sqrt(1 + update.staleness)
            delta = {name: (each * factor).astype(each.dtype) for name, each in update.delta.items()}
            update = replace(update, delta=delta)
        return self.inner.fold(state, acc, update)
