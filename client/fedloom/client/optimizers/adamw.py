"""Adam with decoupled weight decay and a second moment without the noise's share (AdamW, DP-AdamBC)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.client.optimizers.adam import LONGEST_STEP
from fedloom.client.optimizers.api import overshoot
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["AdamW", "moments"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class AdamW(Section):
    """Adam with decoupled weight decay, and without the noise's share of its second moment.

    Decay (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101) pulls toward the round's start, not toward zero: what is
    sent is the change, whose length has a bound only if it does not depend on where the round began. A round that
    begins at zero is the paper's AdamW.

    The noise adds its variance s² to every squared gradient; with `noise_correction` it is taken out again, as
    DP-AdamBC does (Tang et al., AAAI 2024, arXiv 2312.14334): w <- w - r m / sqrt(max(v - s², floor v)), with m and v
    the bias-corrected moments. The paper's floor is an absolute number; here it is a share of v, so that it has no unit
    and no step is longer than Adam's over sqrt(floor). Without noise nothing is corrected.
    """

    weight_decay: float = Field(default=0.0, ge=0, le=1e4)
    """Rate times this is the share of the way back to the round's start that each step goes."""
    noise_correction: bool = False
    """Whether the variance of the noise is subtracted from the second moment (DP-AdamBC)."""
    floor: float = Field(default=0.01, ge=1e-6, le=1)
    """With noise_correction, the least share of the second moment that is left; where it holds, the step is longer than
    Adam's by 1 / sqrt(floor)."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """Adam whose denominator is corrected for noise of this standard deviation."""
        from fedloom.client.optimizers.per_tensor import PerTensor

        std = noise_std if self.noise_correction else 0.0
        # Not in the state, which is a function of the gradients alone.
        starts = {each: each.detach().clone() for group in groups for each in group["params"] if self.weight_decay}

        def step(value: "torch.Tensor", gradient: "torch.Tensor", state: dict[str, Any], rate: float) -> None:
            if self.weight_decay:
                start = starts[value]
                value.sub_(start).mul_(1 - rate * self.weight_decay).add_(start)
            mean, root, bias = moments(state, gradient, std, self.floor)
            value.addcdiv_(mean, root, value=-rate / bias)

        return PerTensor(groups, step)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """7.3 T r sqrt(d), over sqrt(floor) with noise_correction. A decay that overshoots grows as SGD's pull does."""
        shrunk = math.sqrt(self.floor) if self.noise_correction else 1.0
        return steps * LONGEST_STEP * rate * math.sqrt(values) / shrunk * overshoot(steps, rate * self.weight_decay)


def moments(
    state: dict[str, Any], gradient: "torch.Tensor", noise_std: float = 0.0, floor: float = 1.0
) -> tuple["torch.Tensor", "torch.Tensor", float]:
    """Adam's moments with one more gradient, in the order of operations of torch's Adam.

    Args:
        state: Of this tensor; what it lacks is made.
        gradient: Any shape.
        noise_std: Standard deviation of the noise in each of its values, whose share of the second moment is taken out.
        floor: Share of the second moment that is left at least.

    Returns:
        The mean, the root of the second moment, both in the gradient's shape, and what the mean is divided by because
        it began at zero. The step is mean / root / that.
    """
    if "mean" not in state:
        state |= {"step": 0, "mean": gradient.new_zeros(gradient.shape), "square": gradient.new_zeros(gradient.shape)}
    state["step"] += 1
    mean, square = state["mean"], state["square"]
    mean.lerp_(gradient, 1 - _BETA1)
    square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    bias = 1 - _BETA2 ** state["step"]
    corrected = (square - bias * noise_std**2).maximum(floor * square) if noise_std else square
    return mean, (corrected.sqrt() / bias**0.5).add_(_EPSILON), 1 - _BETA1 ** state["step"]
