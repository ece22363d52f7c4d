"""LoRA-SB: between frozen bases B and A an r x r matrix R is trained (Ponkshe et al., 2024, arXiv 2411.19557).

Fed-SB (Singhal et al., 2025, arXiv 2502.15436) averages R, which is exact: W = W0 + s B R A is linear in it. Both
papers take B and A from the gradient of a first step of full fine-tuning. That would carry private rows into tensors
that no noise covers, so here they are the leading singular vectors of W0 itself, which everyone has (as in LoRA-XS,
Bałazy et al., 2024, arXiv 2405.17604), and R starts at zero. They are orthonormal: a change of W is s times as long
as that of R, so noise is no more amplified in one direction than in another.
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
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK

__all__ = ["LoRASB"]


class _Core(Wrapper):
    """y = W0 x + s B R A x + b, with B = U_r of shape (out, r), A = V_rᵀ of shape (r, in) and R of shape (r, r)."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, inner: nn.Module, rank: int, scale: float) -> None:
        super().__init__(inner)
        left, _, right = leading_singular(matrix(inner), rank)
        self.register_buffer("left", scale * left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.lora_R = nn.Parameter(torch.zeros(rank, rank))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return y + F.linear(product(F.linear(x, self.right), self.lora_R, tape), self.left)

    def fold(self) -> None:
        matrix(self.inner).add_(self.left @ self.lora_R @ self.right)


class LoRASB(Section):
    """LoRA-SB, the adapter of Fed-SB: W = W0 + (alpha / rank) B R A with B and A from the SVD of W0, R trained.

    Trained parameters: r² for each target layer, whatever its size. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True, peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r. On layers of 768 by 768 a rank of 64 has fewer parameters than LoRA of rank 3."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """The scale s is alpha / rank."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with an R of zeros between the singular vectors of every target layer.

        Raises:
            ModelError: No layer has one of the target names, or one has no r leading singular vectors.
        """
        scale = self.alpha / self.rank
        return attach_around(host, self.targets, lambda layer: _Core(layer, self.rank, scale), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """R of every target layer, shape (r, r), role lora_R."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Add s B R A to the weights."""
        unwrap(model)
