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
        self._parameters, self._mu, self.linear = parameters, mu, linear
        self._start = [each.detach().clone() for each in parameters] if mu else []

    def now(self) -> list[torch.Tensor]:
        """The term of each parameter at its present value; an empty list where nothing is to be added."""
        if not self._mu and not self.linear:
            return []
        pulls = [self._mu * (w.detach() - w0) for w, w0 in zip(self._parameters, self._start, strict=False)]
        pulls = pulls or [torch.zeros_like(each) for each in self._parameters]
        return [
            pull + self.linear[each] if each in self.linear else pull
            for each, pull in zip(self._parameters, pulls, strict=True)
        ]
