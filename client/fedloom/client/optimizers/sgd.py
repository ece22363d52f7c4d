"""Stochastic gradient descent, with heavy-ball momentum (Polyak, 1964)."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.client.optimizers.api import overshoot
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["SGD"]


class SGD(Section):
    """SGD: v <- m v + g, w <- w - r v."""

    momentum: float = Field(default=0.0, ge=0, le=0.9999)
    """Momentum m."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """Torch's SGD; it does not correct for the noise, whose mean is zero."""
        from torch.optim import SGD as Torch

        return Torch(groups, momentum=self.momentum)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """T r g / (1 - m). A FedProx pull that overshoots, r mu above 2, grows by r mu - 1 in each step."""
        return steps * rate * gradient / (1 - self.momentum) * overshoot(steps, rate * pull)
