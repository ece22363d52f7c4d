"""SaRA: the smallest of the pretrained weights are trained (Hu et al., 2024, arXiv 2409.06633).

Weights near zero say little about what the model knows, so moving them harms it least. Which they are is read off W0,
which is public. The paper's penalty on the rank of the change, and its choice of new entries during training, are not
here: both would follow the values of each client.
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
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, sparse_product
from fedloom.core.config.parsing import Section

__all__ = ["Sparse"]


class _Entries(Wrapper):
    """y = (W0 + S) x + b, where S has the trained values, shape (k,), at fixed entries and is zero elsewhere."""

    places: torch.Tensor

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__(inner)
        sizes = matrix(inner).detach().to("cpu").abs().flatten()
        count = max(1, round(share * len(sizes)))
        # Stable: of equal weights the earlier ones, in every process.
        chosen = torch.argsort(sizes, stable=True)[:count].sort().values
        self.register_buffer("places", chosen.to(matrix(inner).device), persistent=False)
        self.entries = nn.Parameter(torch.zeros(count))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return y + sparse_product(x, self.entries, self.places, y.shape[-1], tape)

    def fold(self) -> None:
        weight = matrix(self.inner)
        change = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        weight.add_(change.index_copy_(0, self.places, self.entries.to(weight)).view(weight.shape))


class Sparse(Section):
    """SaRA: the entries of every target layer's weight that are smallest in size move, the others stay.

    Trained parameters: `share` of the weight's. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True, peft=False)
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each weight's entries that is trained."""
    targets: Targets = ("query", "value")
    """Names (suffixes) of the linear layers, or as for LoRA."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with changes of zero for the smallest entries of every target layer.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return attach_around(host, self.targets, lambda layer: _Entries(layer, self.share), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The changes of the entries of every target layer, shape (k,), role entries, in the order of the weight."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Add the changes to the weights."""
        unwrap(model)
