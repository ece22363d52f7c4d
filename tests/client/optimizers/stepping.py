"""Steps of an optimiser on gradients that a test gives."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedloom.client.optimizers.api import Optimizer

Floats = npt.NDArray[np.float32]
RATE = 0.01


def drawn(steps: int, shape: tuple[int, ...], seed: int = 1, scale: float = 1.0) -> Floats:
    return np.random.default_rng(seed).normal(0, scale, (steps, *shape)).astype(np.float32)


def stepped(made: torch.optim.Optimizer, value: nn.Parameter, gradients: Floats) -> Floats:
    for gradient in gradients:
        value.grad = torch.from_numpy(np.asarray(gradient))
        made.step()
    return value.detach().numpy().copy()


def ran(optimizer: Optimizer, start: Floats, gradients: Floats, noise_std: float = 0.0) -> Floats:
    """Where a round from `start` ends, at a rate of `RATE`."""
    value = nn.Parameter(torch.from_numpy(start.copy()))
    return stepped(optimizer.make([{"params": [value], "lr": RATE}], noise_std), value, gradients)
