"""Adam (Kingma and Ba, ICLR 2015, arXiv 1412.6980)."""

import math
from typing import TYPE_CHECKING, Any

from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["LONGEST_STEP", "Adam"]

LONGEST_STEP = 7.3
"""A value moves by at most so many learning rates in one step: (1 - b1) / sqrt((1 - b2)(1 - b1²/b2)) at b1 = 0.9 and b2
= 0.999, by Cauchy and Schwarz. Gradients that grow by b2/b1 come to it; section 2.1 of the paper has 3.2, for one
gradient after many zeros."""


class Adam(Section):
    """Adam with the paper's constants."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """Torch's Adam; it does not correct its second moment for the noise."""
        from torch.optim import Adam as Torch

        return Torch(groups)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """7.3 T r sqrt(d), whatever the gradient."""
        return steps * LONGEST_STEP * rate * math.sqrt(values)
