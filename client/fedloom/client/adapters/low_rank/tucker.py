"""FLoRA: a change of the weight as a Tucker decomposition (Si et al., 2024, arXiv 2405.14739).

Of a matrix that is W = W0 + s U G Vᵀ: a core G of r x r between two factors, all of them trained. It is not the
strategy FLoRA of Wang et al. (NeurIPS 2024), which stacks the factors of LoRA.
"""

from typing import ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK
from fedloom.core.schema import Start

__all__ = ["Tucker"]

_DRAWN = {"tucker_U": Start.KAIMING, "tucker_V": Start.KAIMING}


class _Decomposed(Wrapper):
    """y = W0 x + s U G Vᵀ x + b, with Vᵀ of shape (r, in), G (r, r) and U (out, r); G starts at zero."""

    def __init__(self, inner: nn.Module, rank: int, scale: float) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        self.scale = scale
        self.tucker_V = nn.Parameter(torch.zeros(rank, inputs))
        self.tucker_G = nn.Parameter(torch.zeros(rank, rank))
        self.tucker_U = nn.Parameter(torch.zeros(outputs, rank))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        core = product(product(x.float(), self.tucker_V, tape), self.tucker_G, tape)
        return (y + self.scale * product(core, self.tucker_U, tape)).to(y.dtype)

    def fold(self) -> None:
        matrix(self.inner).add_(self.scale * self.tucker_U @ self.tucker_G @ self.tucker_V)


class Tucker(Section):
    """FLoRA's Tucker decomposition: W = W0 + (alpha / rank) U G V^T, all three trained.

    Trained parameters: r for each input and each output of a target layer, and r². Their average is not that of the
    models, unless a strategy trains one of the three alone.
    """

    traits: ClassVar[Traits] = Traits(peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """The scale s is alpha / rank."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a decomposed change of every target layer.

        Raises:
            ModelError: No layer has one of the target names.
        """
        scale = self.alpha / self.rank
        return attach_around(host, self.targets, lambda layer: _Decomposed(layer, self.rank, scale), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The three tensors of every target layer, roles tucker_V, tucker_G and tucker_U."""
        return wrapped_slots(model, _DRAWN)

    def merge(self, model: PeftModel) -> None:
        """Add s U G Vᵀ to the weights."""
        unwrap(model)
