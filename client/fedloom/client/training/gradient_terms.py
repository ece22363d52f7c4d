"""Terms of a step's gradient that are no function of the data: FedProx's pull, and what a strategy adds."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["GradientTerms"]


class GradientTerms:
    """mu (w - w0) + l for each parameter w of a round that starts at w0.

    mu/2 |w - w0|^2 is FedProx's (Li et al., MLSys 2020), and l what the broadcast carries for the tensor (SCAFFOLD,
    FedDyn). In a private run the sum joins the gradient after clipping and noise: whatever a coordinator puts there is
    post-processing, and can neither use up the room of a clipped gradient nor change its noise.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], mu: float, linear: Mapping[nn.Parameter, torch.Tensor]
    ) -> None:
        """Begin at the parameters' present values.

        Args:
            parameters: What is trained.
            mu: FedProx's; 0 for no pull.
            linear: l, of the parameters that have one.
        """
        self._mu, self.linear = mu, linear
        self._start = {each: each.detach().clone() for each in parameters} if mu else {}

    def now(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """The terms of those that move in this step, at their present values; an empty list if nothing is added."""
        return [self._term(each) for each in parameters] if self._mu or self.linear else []

    def _term(self, parameter: nn.Parameter) -> torch.Tensor:
        now = parameter.detach()
        pull = self._mu * (now - self._start[parameter]) if self._mu else torch.zeros_like(now)
        return pull + self.linear[parameter] if parameter in self.linear else pull
