"""Muon: steps along the orthogonalised momentum (Jordan et al., 2024; Liu et al., 2025, arXiv 2502.16982)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["Muon"]

_RMS = 0.2
"""Root mean square of a step of full rank, in learning rates: about Adam's, so that rates carry over (2502.16982)."""


class Muon(Section):
    """Steps of the same length along every singular direction of a matrix of gradients.

    v <- m v + g, w <- w - 0.2 r sqrt(max(rows, columns)) U Vᵀ, for U S Vᵀ = g + m v (Nesterov).

    One strong direction of the noised gradient does not hide the others; neither does it stand out from noise. A
    tensor that is no matrix is one column: SGD with momentum whose gradient is brought to norm 0.2 sqrt(rows). U Vᵀ is
    exact, by a singular value decomposition in float32: the matrices of an adapter are thin, and five steps of Newton
    and Schulz leave singular values from about 0.5 to 1.5.
    """

    momentum: float = Field(default=0.0, ge=0, le=0.9999)
    """Momentum m; the paper's is 0.95, for runs of many more steps than a round has."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """It does not correct for the noise, which turns the directions and has no say in their length."""
        from fedloom.client.optimizers.per_tensor import PerTensor
        from fedloom.client.optimizers.spectral import on_singular_values

        def step(value: "torch.Tensor", gradient: "torch.Tensor", state: dict[str, Any], rate: float) -> None:
            velocity = state.setdefault("velocity", gradient.new_zeros(gradient.shape))
            velocity.mul_(self.momentum).add_(gradient)
            direction = gradient.add(velocity, alpha=self.momentum)
            value.sub_(on_singular_values(direction, _equal), alpha=_RMS * rate)

        return PerTensor(groups, step)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """0.2 T r sqrt(d), whatever the gradient: U Vᵀ has at most min(rows, columns) singular values of 1."""
        return _RMS * steps * rate * math.sqrt(values)


def _equal(values: "torch.Tensor", rows: int, columns: int) -> "torch.Tensor":
    """sqrt(max(rows, columns)) for each singular value that is more than rounding, and 0 for the others."""
    rounding = 2.0**-23 * max(rows, columns) * values[0]
    return (values > rounding) * math.sqrt(max(rows, columns))
