"""Two adapters on every layer, for one to be shared and one kept (Yang et al., NeurIPS 2024, arXiv 2403.19211).

y = W0 x + b + s (B_s A_s x + B_o A_o x), so W = W0 + s (B_s A_s + B_o A_o).
"""

from typing import ClassVar

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, sizes, unwrap, wrappers
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK
from fedloom.core.schema import Start, TensorSpec

__all__ = ["DualLoRA"]


class _Pairs(Wrapper):
    """The shared pair A_s (r, in), B_s (out, r) and the own pair A_o, B_o of the same shapes."""

    def __init__(self, inner: nn.Module, rank: int, scale: float) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        self.scale = scale
        self.shared_A = nn.Parameter(torch.zeros(rank, inputs))
        self.shared_B = nn.Parameter(torch.zeros(outputs, rank))
        self.own_A = nn.Parameter(torch.zeros(rank, inputs))
        self.own_B = nn.Parameter(torch.zeros(outputs, rank))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        shared = product(product(x.float(), self.shared_A, tape), self.shared_B, tape)
        own = product(product(x.float(), self.own_A, tape), self.own_B, tape)
        return (y + self.scale * (shared + own)).to(y.dtype)

    def fold(self) -> None:
        matrix(self.inner).add_(self.scale * (self.shared_B @ self.shared_A + self.own_B @ self.own_A))


class DualLoRA(Section):
    """Two low-rank pairs beside every target layer: W = W0 + (alpha / rank) (B_s A_s + B_o A_o).

    For strategies that share one and leave the other with its client, such as `feddpa`. Both factors of the one have
    the role shared, those of the other the role own. Trained parameters: 2 r for each input and each output of a target
    layer. Their average is not that of the models.
    """

    traits: ClassVar[Traits] = Traits(peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of either pair."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """The scale of both is alpha / rank."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with two pairs on every target layer.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return attach_around(host, self.targets, lambda layer: _Pairs(layer, self.rank, self.alpha / self.rank))

    def slots(self, model: PeftModel) -> list[Slot]:
        """The factors of every target layer, A before B; each pair has one role."""
        found: list[Slot] = []
        for module, wrapper in wrappers(model):
            for name, each in wrapper.named_parameters(recurse=False):
                role, factor = name.split("_")
                start, axis = (Start.KAIMING, 0) if factor == "A" else (Start.ZERO, 1)
                spec = TensorSpec(f"{module}.{name}", module, role, tuple(each.shape), start, axis)
                found.append(Slot(spec, each))
        return found

    def merge(self, model: PeftModel) -> None:
        """Add both products to the weights."""
        unwrap(model)
