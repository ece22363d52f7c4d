"""Hydra: a pair beside the layer and a pair behind it (Kim et al., 2023, arXiv 2309.06922).

y = W0 x + b + B_p A_p x + B_s A_s (W0 x + b), so W = W0 + B_p A_p + B_s A_s W0.
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
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, plain, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK
from fedloom.core.schema import Start

__all__ = ["Hydra"]

_DRAWN = {"parallel_A": Start.KAIMING, "sequential_A": Start.KAIMING}
_AXES = {"parallel_A": 0, "parallel_B": 1, "sequential_A": 0, "sequential_B": 1}


class _Branches(Wrapper):
    """Parallel pair A_p (r, in), B_p (out, r) and sequential pair A_s (r, out), B_s (out, r) (equation 3)."""

    def __init__(self, inner: nn.Module, rank: int) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        self.parallel_A = nn.Parameter(torch.zeros(rank, inputs))
        self.parallel_B = nn.Parameter(torch.zeros(outputs, rank))
        self.sequential_A = nn.Parameter(torch.zeros(rank, outputs))
        self.sequential_B = nn.Parameter(torch.zeros(outputs, rank))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        parallel = product(product(x.float(), self.parallel_A, tape), self.parallel_B, tape)
        sequential = product(product(y.float(), self.sequential_A, tape), self.sequential_B, tape)
        return (y + parallel + sequential).to(y.dtype)

    def fold(self) -> None:
        weight, behind = matrix(self.inner), self.sequential_B @ self.sequential_A
        weight.add_(behind @ weight + self.parallel_B @ self.parallel_A)
        if (bias := plain(self.inner).bias) is not None:
            bias.add_(behind @ bias)


class Hydra(Section):
    """Hydra: a low-rank pair beside every target layer and one behind it, W = W0 + B_p A_p + B_s A_s W0.

    Trained parameters: r for each input and 3 r for each output of a target layer. Their average is not that of the
    models, unless a strategy trains the A or the B alone.
    """

    traits: ClassVar[Traits] = Traits(peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of either pair; the paper gives each half of LoRA's."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with two pairs on every target layer.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return attach_around(host, self.targets, lambda layer: _Branches(layer, self.rank), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The factors of every target layer, roles parallel_A, parallel_B, sequential_A and sequential_B."""
        return wrapped_slots(model, _DRAWN, _AXES)

    def merge(self, model: PeftModel) -> None:
        """Fold both pairs into the weights, and the sequential one into the biases too."""
        unwrap(model)
