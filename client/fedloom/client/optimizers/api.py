"""What a local optimiser is: options, how torch gets it, and how far it can move.

A component of the entry-point group `fedloom.optimizers`; its fields are keys of [train]. It only ever sees gradients
that are clipped and noised already, so its state is post-processing and costs no privacy.
"""

import math
from typing import TYPE_CHECKING, Any, Protocol

from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.privacy.spends import banded

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["Optimizer", "compounded", "noise_std", "optimizer_of", "overshoot"]

_MOST_GROWTH = 500.0
"""Natural logarithm beyond which a growth counts as infinite; float64 ends at 709."""


class Optimizer(Protocol):
    """One optimiser with its options.

    One whose moves are linear in the gradients may also have `noise_moved(steps, rate, noise_std) -> float | None`: the
    standard deviation of what noise in every gradient moves each value by in a round, or None where its options leave
    that unknown. Strategies that take the noise out of what they measure work with such an optimiser alone.
    """

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """The optimiser of one client's round, with fresh state.

        Args:
            groups: Parameter groups, each with its learning rate: "params" and "lr".
            noise_std: Standard deviation of the noise in each value of the gradients that it will see, which a method
                may correct for; 0 without privacy.
        """

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """How long the change of all trained values can get, as an L2 norm. Longer updates are refused.

        Args:
            steps: Steps in a round.
            rate: Learning rate, the largest of all groups.
            gradient: L2 norm of a step's gradient.
            values: Number of trained values.
            pull: FedProx's mu: pull * (value - start) is part of the gradient; 0 for none.
        """


def noise_std(spec: Spec, declared_examples: int | None) -> float:
    """Standard deviation of the noise in each value of a step's gradient; 0 without privacy.

    With noise bands steps differ, and it is the root of their mean variance.
    """
    privacy, strategy = spec.privacy, banded(spec)
    if not privacy.enabled or privacy.noise_multiplier is None or declared_examples is None:
        return 0.0
    spread = 1.0 if strategy is None else math.sqrt(float((strategy.spread() ** 2).mean()))
    return spread * privacy.noise_multiplier * privacy.clip_norm / (spec.train.sampling_rate * declared_examples)


def optimizer_of(train: TrainSection) -> Optimizer:
    """The optimiser that [train] names, with its options.

    Raises:
        ConfigError: There is no such optimiser here, or it refuses its options.
    """
    made: Optimizer = train.built()
    return made


def compounded(steps: int, share: float) -> float:
    """What a change of 1 in each step adds up to if each step also adds `share` of all before it: T for a share of 0.

    ((1 + share)^T - 1) / share; infinite where float64 cannot hold it.
    """
    growth = steps * math.log1p(share)
    if growth > _MOST_GROWTH:
        return math.inf
    return math.expm1(growth) / share if share else float(steps)


def overshoot(steps: int, share: float) -> float:
    """How much a distance has grown after so many steps that each go `share` of the way back: 1 up to a share of 2.

    Beyond 2 a step lands on the other side, farther away by share - 1; infinite where float64 cannot hold it.
    """
    growth = steps * math.log(max(1.0, share - 1))
    return math.exp(growth) if growth <= _MOST_GROWTH else math.inf
