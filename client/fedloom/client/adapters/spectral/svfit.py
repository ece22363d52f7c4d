"""SVFit: the leading singular values of a weight move, its singular vectors stay (Sun et al., 2024, arXiv 2409.05926).

W = U_r diag(s + d) V_rᵀ + the rest, where the SVD is that of W0. The change d of the singular values is what travels.
"""

from typing import ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.spectral.basis import leading_singular
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK

__all__ = ["SVFit"]


class _SingularValues(Wrapper):
    """y = W0 x + U_r (d ⊙ V_rᵀ x) + b, with d of shape (r,)."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, inner: nn.Module, rank: int) -> None:
        super().__init__(inner)
        left, _, right = leading_singular(matrix(inner), rank)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.singular_values = nn.Parameter(torch.zeros(rank))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return y + F.linear(scale(F.linear(x, self.right), self.singular_values, tape), self.left)

    def fold(self) -> None:
        matrix(self.inner).add_(self.left * self.singular_values @ self.right)


class SVFit(Section):
    """SVFit: the r largest singular values of every target layer's weight.

    Trained parameters: r for each target layer, whatever its size. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True, peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """How many singular values of each layer are trained; the paper takes hundreds."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with the singular values that it has.

        Raises:
            ModelError: No layer has one of the target names, or one has no r leading singular vectors.
        """
        return attach_around(host, self.targets, lambda layer: _SingularValues(layer, self.rank), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The changes of the singular values of every target layer, shape (r,), role singular_values."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Put the moved singular values into the weights."""
        unwrap(model)
