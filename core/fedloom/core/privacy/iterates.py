"""The noise in a mean of iterates."""

import math
from collections.abc import Callable

import numpy as np

__all__ = ["noise_of_mean"]


def noise_of_mean(moved: Callable[[int], float], steps: int, decay: float) -> float:
    """Standard deviation of the noise in the exponential mean of a round's iterates.

    The mean after T steps is sum_t b^(T-t) w_t / sum_t b^(T-t) (De et al., 2022, arXiv 2204.13650). Where w_t is linear
    in the noise of its steps, which is independent from step to step, the noise of a step moves the iterate j steps
    on by h_j times it, and h_j^2 = moved(j)^2 - moved(j - 1)^2.

    Args:
        moved: Standard deviation of the noise in the iterate after so many steps; linear in independent noise.
        steps: T, at least 1.
        decay: b, from 0 to below 1; 0 is the last iterate.

    >>> round(noise_of_mean(lambda steps: steps**0.5, 4, 0.0), 3)
    2.0
    >>> round(noise_of_mean(lambda steps: steps**0.5, 2, 0.5), 3)  # w_1 and w_2 count 1/3 and 2/3
    1.202
    """
    if not decay:
        return moved(steps)
    squares = np.array([0.0, *(moved(step) ** 2 for step in range(1, steps + 1))])
    response = np.sqrt(np.diff(squares))
    weights = decay ** np.arange(steps - 1, -1, -1.0)
    weights /= weights.sum()
    shares = [float(weights[step:] @ response[: steps - step]) for step in range(steps)]
    return math.hypot(*shares)
