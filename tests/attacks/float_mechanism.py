"""The mechanism before noise went to whole numbers, as it was: float32 sums, and Box-Muller noise times sigma C."""

from typing import Any

import numpy as np
import torch

from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import System

__all__ = ["FloatMechanism"]


class FloatMechanism(PrivateOptimizer):
    """Test only: two attacks of this folder see through it."""

    def __init__(self, *arguments: Any, clip_norm: float, **rest: Any) -> None:
        super().__init__(*arguments, clip_norm=1.0, **rest)
        self.max_grad_norm = clip_norm
        self._floats = torch.zeros(self.tape.width)

    def clip_and_accumulate(self, real: int | None = None) -> None:
        factors = (self.max_grad_norm / (self.tape.norms() + 1e-6)).clamp(max=1.0)
        self._floats += factors[:real] @ self.tape.flat[:real]

    def add_noise(self) -> None:
        half, system = (self.tape.width + 1) // 2, System()
        radius = np.sqrt(-2.0 * np.log1p(-system.uniform(half)))
        angle = 2.0 * np.pi * system.uniform(half)
        drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: self.tape.width]
        noise = torch.from_numpy(drawn).to(torch.float32)
        noisy = torch.add(self._floats, noise, alpha=self.noise_multiplier * self.max_grad_norm)
        for parameter in self.tape.parameters:
            parameter.grad = noisy[self.tape.columns[parameter]].view_as(parameter)
        self._floats.zero_()
