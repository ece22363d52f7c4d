"""SaRA, LIFT: chosen weights are trained (Hu et al., 2024, arXiv 2409.06633; Liu et al., 2025, arXiv 2506.00772).

SaRA takes the smallest: they say little about what the model knows, so moving them harms it least. LIFT takes the
largest of the weight's best approximation of rank r. Which they are is read off W0, which is public. What both papers
do during training is not here, as it would follow the values of each client: SaRA's penalty on the rank of the change
and its choice of new entries, and LIFT's mask anew every so many steps.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from pydantic import Field
from torch import nn

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.sparse.masks import digest, principal, smallest
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, sparse_product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK

__all__ = ["ENTRIES", "Sparse", "add_entries", "named_by_mask"]

ENTRIES = "entries"
"""Role of the changes of chosen entries, shape (k,), in the order of the weight."""


class _Entries(Wrapper):
    """y = (W0 + S) x + b, where S has the trained values, shape (k,), at fixed entries and is zero elsewhere."""

    places: torch.Tensor

    def __init__(self, inner: nn.Module, places: torch.Tensor) -> None:
        super().__init__(inner)
        self.register_buffer("places", places, persistent=False)
        self.entries = nn.Parameter(torch.zeros(len(places)))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return y + sparse_product(x, self.entries, self.places, y.shape[-1], tape)

    def fold(self) -> None:
        add_entries(matrix(self.inner), self.places, self.entries)


class Sparse(Section):
    """SaRA, or LIFT: the entries of every target layer's weight that a mask chooses move, the others stay.

    Trained parameters: `share` of the weight's. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True, peft=False)
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each weight's entries that is trained; SaRA takes 0.1 to 0.2, LIFT 0.05."""
    mask: Literal["smallest", "principal"] = "smallest"
    """smallest: the entries of least size (SaRA). principal: the largest ones of the weight's best approximation of a
    lower rank (LIFT)."""
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of the approximation of a principal mask; LIFT takes 128."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with changes of zero for the chosen entries of every target layer.

        Raises:
            ModelError: No layer has one of the target names, or one has no r singular values for a principal mask.
        """
        return attach_around(host, self.targets, lambda layer: _Entries(layer, self._places(layer)), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The changes of the entries of every target layer, shape (k,), role entries, in the order of the weight."""
        return named_by_mask(model, wrapped_slots(model))

    def merge(self, model: PeftModel) -> None:
        """Add the changes to the weights."""
        unwrap(model)

    def _places(self, layer: nn.Module) -> torch.Tensor:
        weight = matrix(layer)
        count = max(1, round(self.share * weight.numel()))
        return smallest(weight, count) if self.mask == "smallest" else principal(weight, count, self.rank)


def named_by_mask(model: PeftModel, slots: list[Slot]) -> list[Slot]:
    """The slots, where names of role entries end in the digest of their mask."""
    found = []
    for slot in slots:
        spec = slot.spec
        if spec.role == ENTRIES:
            mark = digest(model.get_base_model().get_submodule(spec.module).places)
            spec = replace(spec, name=f"{spec.name}.{mark}")
        found.append(replace(slot, spec=spec))
    return found


def add_entries(weight: torch.Tensor, places: torch.Tensor, entries: torch.Tensor) -> None:
    """Add values of shape (k,) to the entries at `places` of a weight, counted row by row, in place."""
    change = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    weight.add_(change.index_copy_(0, places, entries.to(weight)).view(weight.shape))
