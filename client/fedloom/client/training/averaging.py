"""Averages of the iterates of a round: a function of what was noised already, which costs no privacy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["averaged"]


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], decay: float) -> Iterator[None]:
    """Leave the exponential mean of the values after each step, in place of the last ones (De et al., 2204.13650).

    After T steps it is sum_t b^(T-t) w_t / sum_t b^(T-t), for a decay of b: the start has no weight, as in Adam's
    bias correction. Steps are taken from the last values, not from the mean. A mean is not farther from the start
    than the farthest of its iterates, so the bound on the optimiser's moves holds for it.

    Args:
        optimizer: Takes the steps.
        parameters: What it moves.
        decay: b, from 0 to below 1; 0 leaves the last values, without memory for a mean.
    """
    if not decay:
        yield
        return
    start = [each.detach().clone() for each in parameters]
    # Of the changes rather than the values, so that what does not move stays what it is to the last bit.
    means, steps = [torch.zeros_like(each) for each in start], 0

    def add(*_: object) -> None:
        nonlocal steps
        steps += 1
        for mean, parameter, begin in zip(means, parameters, start, strict=True):
            mean.lerp_(parameter.detach() - begin, 1 - decay)

    hook = optimizer.register_step_post_hook(add)
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        for mean, parameter, begin in zip(means, parameters, start, strict=True):
            if steps:  # a sample may have been empty in every step of a run without privacy
                parameter.copy_(begin + mean / (1 - decay**steps))
