"""Stochastic gradient descent, with heavy-ball momentum (Polyak, 1964)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.client.optimizers.api import overshoot
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["SGD"]


class SGD(Section):
    """SGD: v <- m v + g, w <- w - r v.

    With `smoothing`, g is the gradient after LA-LoRA's low-pass filter (Liu et al., ICLR 2026, arXiv 2602.19926): the
    weighted mean of each value and its four neighbours, along the longest axis of each tensor. That is post-processing
    of a noised gradient. It takes out all but 70/256 of the noise's variance, and of the gradient whatever neighbours
    do not share.
    """

    momentum: float = Field(default=0.0, ge=0, le=0.9999)
    """Momentum m."""
    smoothing: bool = False
    """Whether each gradient is smoothed along its longest axis by [1, 4, 6, 4, 1] / 16."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """Torch's SGD; it does not correct for the noise, whose mean is zero."""
        from torch.optim import SGD as Torch

        from fedloom.client.optimizers.low_pass import smoothed

        made = Torch(groups, momentum=self.momentum)
        return smoothed(made) if self.smoothing else made

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """T r g / (1 - m). A FedProx pull that overshoots, r mu above 2, grows by r mu - 1 in each step.

        Smoothing lengthens neither: its eigenvalues are from 0 to 1.
        """
        return steps * rate * gradient / (1 - self.momentum) * overshoot(steps, rate * pull)

    def noise_moved(self, steps: int, rate: float, noise_std: float) -> float | None:
        """By s r sqrt(sum_j ((1 - m^j) / (1 - m))²), j from 1 to T; unknown with smoothing, which mixes values."""
        if self.smoothing:
            return None
        m = self.momentum
        return noise_std * rate * math.hypot(*((1 - m**j) / (1 - m) for j in range(1, steps + 1)))
