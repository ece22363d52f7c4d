"""SGD without what noise adds to a gradient's singular values (Gavish and Donoho, IEEE T-IT 2017, arXiv 1405.7511)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.client.optimizers.api import compounded
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

    from fedloom.client.optimizers.spectral import Spectrum

__all__ = ["SpectrumSGD"]


class SpectrumSGD(Section):
    """SGD whose gradients have no more of the singular values that noise alone would have.

    v <- m v + g, w <- w - r U f(S) Vᵀ, for U S Vᵀ = v.

    Noise of standard deviation s alone gives an m by n matrix singular values up to s (sqrt(m) + sqrt(n)), the edge of
    Marchenko and Pastur: f is 0 up to there. A larger value y becomes
    sqrt((y² - s² (sqrt(m) + sqrt(n))²) (y² - s² (sqrt(m) - sqrt(n))²)) / y, the paper's optimal shrinker for the
    Frobenius norm, which takes out what noise adds to it and what it turned away from the truth. s grows
    with the momentum, which sums noise. A tensor that is no matrix is one column, where f is nearly James and Stein's.
    Without privacy it is SGD.
    """

    momentum: float = Field(default=0.0, ge=0, le=0.9999)
    """Momentum m. The sum of more gradients has more beyond its noise."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """It shrinks by what noise of this standard deviation does."""
        from fedloom.client.optimizers.per_tensor import PerTensor
        from fedloom.client.optimizers.spectral import on_singular_values

        def step(value: "torch.Tensor", gradient: "torch.Tensor", state: dict[str, Any], rate: float) -> None:
            velocity = state.setdefault("velocity", gradient.new_zeros(gradient.shape))
            velocity.mul_(self.momentum).add_(gradient)
            state["summed"] = self.momentum**2 * state.get("summed", 0.0) + 1
            variance = noise_std**2 * state["summed"]
            direction = on_singular_values(velocity, _shrunken(variance)) if variance else velocity
            value.sub_(direction, alpha=rate)

        return PerTensor(groups, step)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """T r g / (1 - m) without a pull; (g / mu) ((1 + r mu / (1 - m))^T - 1) with one.

        No singular value grows, so no step is longer than SGD's of the same momentum; but two that are shrunken need
        not be closer together than before, so a pull may not bring back what it brings SGD back.
        """
        longest = rate / (1 - self.momentum)
        return longest * gradient * compounded(steps, longest * pull)


def _shrunken(variance: float) -> "Spectrum":
    """The optimal shrinker for noise of this variance in each value."""

    def shrink(values: "torch.Tensor", rows: int, columns: int) -> "torch.Tensor":
        edge = variance * (math.sqrt(rows) + math.sqrt(columns)) ** 2
        other = variance * (math.sqrt(rows) - math.sqrt(columns)) ** 2
        squares = values.double().square()
        shrunken = ((squares - edge).clamp(min=0) * (squares - other)).clamp(min=0).sqrt()
        return (shrunken / values.double().clamp(min=1e-300)).to(values.dtype)

    return shrink
