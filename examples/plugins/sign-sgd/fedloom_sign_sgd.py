"""Sign-SGD with momentum: v <- m v + (1 - m) g, w <- w - r sign(v) (Signum: Bernstein et al., 2018, 1802.04434)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["SignSGD"]


class SignSGD(Section):
    """Sign-SGD with momentum: every value moves by the learning rate, whatever its gradient's size."""

    momentum: float = Field(default=0.9, ge=0, le=0.9999)
    """Momentum m."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        import torch

        class Sign(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: None = None) -> None:  # type: ignore[override]
                for group in self.param_groups:
                    for each in group["params"]:
                        mean = self.state[each].setdefault("mean", torch.zeros_like(each))
                        mean.lerp_(each.grad, 1 - group["momentum"])
                        each.sub_(mean.sign(), alpha=group["lr"])

        return Sign(groups, {"momentum": self.momentum})

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        return steps * rate * math.sqrt(values)
