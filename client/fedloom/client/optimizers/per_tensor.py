"""A torch optimiser that treats every tensor by itself, by one function.

It brings torch, which a coordinator has not: import it where an optimiser is made.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["PerTensor", "Rule"]

Rule = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], float], None]
"""Moves a value in place, given its gradient, its state, which is empty before the first step, and its rate."""


class PerTensor(torch.optim.Optimizer):
    """Applies a rule to each tensor that has a gradient."""

    def __init__(self, groups: list[dict[str, Any]], rule: Rule) -> None:
        """Each group has its learning rate: "params" and "lr"."""
        super().__init__(groups, {})
        self._rule = rule

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss
        """One step of every tensor."""
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    self._rule(each, each.grad, self.state[each], group["lr"])
