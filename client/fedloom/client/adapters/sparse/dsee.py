"""DSEE: a low-rank pair and a few entries of the weight move together (Chen et al., ACL 2023, arXiv 2111.00160).

W = W0 + s U V + S, with S zero outside of a fixed support: where W0 is fitted worst by a low-rank matrix, found from
W0 alone. The second half of the paper, pruning W0 itself to make it smaller, is not here: the base model is frozen.
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
from fedloom.client.adapters.sparse.entries import add_entries, named_by_mask
from fedloom.client.adapters.sparse.masks import residual
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, product, sparse_product
from fedloom.core.config.parsing import Section
from fedloom.core.limits import MAX_RANK
from fedloom.core.schema import Start

__all__ = ["DSEE"]

_DRAWN = {"dsee_V": Start.KAIMING}
_AXES = {"dsee_V": 0, "dsee_U": 1}


class _PairAndEntries(Wrapper):
    """y = W0 x + s U V x + S x + b, with V of shape (r, in), U (out, r) and k entries of S."""

    places: torch.Tensor

    def __init__(self, inner: nn.Module, rank: int, scale: float, count: int) -> None:
        super().__init__(inner)
        outputs, inputs = sizes(inner)
        if count > outputs * inputs:
            raise ValueError(f"adapter.entries = {count} is above its {outputs * inputs} entries; lower it")
        self.scale = scale
        self.register_buffer("places", residual(matrix(inner), count, rank), persistent=False)
        self.dsee_V = nn.Parameter(torch.zeros(rank, inputs))
        self.dsee_U = nn.Parameter(torch.zeros(outputs, rank))
        self.entries = nn.Parameter(torch.zeros(count))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        pair = product(product(x, self.dsee_V, tape), self.dsee_U, tape)
        return y + self.scale * pair + sparse_product(x, self.entries, self.places, y.shape[-1], tape)

    def fold(self) -> None:
        weight = matrix(self.inner)
        weight.add_(self.scale * self.dsee_U @ self.dsee_V)
        add_entries(weight, self.places, self.entries)


class DSEE(Section):
    """DSEE: W = W0 + (alpha / rank) U V + S, where S has a few entries at fixed places.

    Trained parameters: r for each input and each output of a target layer, and `entries`. Their average is not that of
    the models, unless a strategy freezes U or V.
    """

    traits: ClassVar[Traits] = Traits(trains_base=True, peft=False)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """Rank r of the pair, and of the approximation that S's places are found by."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """The scale s is alpha / rank."""
    entries: int = Field(default=64, ge=1, le=1_000_000)
    """Entries of S in each target layer; the paper takes 64."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with a pair and changes of zero for the entries of every target layer.

        Raises:
            ModelError: No layer has one of the target names, or one has fewer entries or singular values.
        """
        scale = self.alpha / self.rank
        return attach_around(
            host,
            self.targets,
            lambda layer: _PairAndEntries(layer, self.rank, scale, self.entries),
            self.layers,
        )

    def slots(self, model: PeftModel) -> list[Slot]:
        """The tensors of every target layer, roles dsee_V, dsee_U and entries."""
        return named_by_mask(model, wrapped_slots(model, _DRAWN, _AXES))

    def merge(self, model: PeftModel) -> None:
        """Add s U V and S to the weights."""
        unwrap(model)
