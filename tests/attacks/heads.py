"""A classification head on fixed features: all that a round trains when a coordinator asks for the head alone."""

import numpy as np
import torch
from torch import nn

from fedloom.client.privacy.auditing.attacks import Make, Singles
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.rng import System

__all__ = ["WIDTH", "Head"]

WIDTH = 384


class Head:
    """The head, and a target row whose label is not the one that the bias in the broadcast makes certain.

    The other row has that label, and so a gradient of exactly zero.

    Args:
        make: Makes the optimizer.
        learning_rate: Of SGD without momentum.
        size: Size of the target's features.
        divisor: Expected batch.
    """

    def __init__(
        self,
        make: Make,
        *,
        clip_norm: float,
        sigma: float,
        learning_rate: float,
        size: float = 1.0,
        divisor: float = 1.0,
    ) -> None:
        self.layer = nn.Linear(WIDTH, 2)
        self._start = torch.tensor([1000.0, 0.0])
        self._make, self._rate = make, learning_rate
        self._numbers = {"noise_multiplier": sigma, "clip_norm": clip_norm, "expected_batch": divisor}
        self._features = size * torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
        self._rest = torch.ones(1, WIDTH)

    def round(self, target: list[bool]) -> Singles:
        """Train from the broadcast; `target` says of each step whether the row is in its sample.

        Returns:
            The change of the weights, then of the two biases.
        """
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.copy_(self._start)
        parameters = list(self.layer.parameters())
        base = torch.optim.SGD(parameters, lr=self._rate)
        with recording(self.layer, parameters) as tape:
            optimizer = self._make(base, tape, System(), **self._numbers)
            for sampled in target:
                rows = torch.cat([self._features, self._rest])[0 if sampled else 1 :]
                labels = torch.tensor([1, 0])[0 if sampled else 1 :]
                tape.begin(len(rows))
                torch.autograd.backward(nn.functional.cross_entropy(self.layer(rows), labels, reduction="sum"))
                optimizer.accumulate()
                optimizer.release()
        changes = [self.layer.weight.detach().ravel(), self.layer.bias.detach() - self._start]
        return np.asarray(torch.cat(changes).numpy(), np.float32)
