"""Adam (Kingma and Ba, ICLR 2015, arXiv 1412.6980)."""

import math
from typing import TYPE_CHECKING, Any

from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["Adam"]

_STEP = 3.2
"""A value moves by at most (1 - 0.9) / sqrt(1 - 0.999) learning rates in one step (section 2.1)."""


class Adam(Section):
    """Adam with the paper's constants."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """Torch's Adam; it does not correct its second moment for the noise."""
        from torch.optim import Adam as Torch

        return Torch(groups)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """3.2 T r sqrt(d), whatever the gradient."""
        return steps * _STEP * rate * math.sqrt(values)
