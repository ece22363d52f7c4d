"""SSF: what linear layers and layer norms give is scaled and shifted (Lian et al., NeurIPS 2022, arXiv 2210.08823)."""

from typing import ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.layer_norm import layer_norms
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers, in_layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, plain, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale, shift
from fedloom.core.config.parsing import Section

__all__ = ["SSF"]


class _ScaleShift(Wrapper):
    """y = γ ⊙ f(x) + β (equation 2), as the changes of γ from one and of β from zero; shape (out,) each.

    A layer without a bias has no place that could take up β, and gets none.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        layer = plain(inner)
        size = len(layer.weight) if isinstance(layer, nn.LayerNorm) else sizes(layer)[0]
        self.scale = nn.Parameter(torch.zeros(size))
        self.shift = None if layer.bias is None else nn.Parameter(torch.zeros(size))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.given(x)
        return shift(y + scale(y, self.scale, tape), self.shift, tape).to(y.dtype)

    def fold(self) -> None:
        layer, factor = plain(self.inner), 1 + self.scale
        # The last axis of a Conv1D's weight is its outputs, and the only one of a norm's.
        last = isinstance(layer, Conv1D | nn.LayerNorm)
        layer.weight.mul_(factor if last else factor[:, None])
        if self.shift is not None:
            layer.bias.mul_(factor).add_(self.shift)


class SSF(Section):
    """SSF: a learned scale and shift after every target layer and every layer norm.

    Trained parameters: two for each output of such a layer, one where it has no bias. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, peft=False)
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA; the paper takes all of them."""
    norms: bool = True
    """Whether layer norms get a scale and a shift too, as in the paper."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with scales of one and shifts of zero.

        Raises:
            ModelError: No layer has one of the target names.
        """
        norms = in_layers(host.base, self.layers, layer_norms(host.base, host.head)) if self.norms else []
        model = attach_around(host, self.targets, _ScaleShift, self.layers)
        for name in norms:
            host.base.set_submodule(name, _ScaleShift(host.base.get_submodule(name)))
        return model

    def slots(self, model: PeftModel) -> list[Slot]:
        """The vectors of every layer, roles scale and shift, as changes from one and from zero."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Take up scales and shifts in weights and biases (equation 5)."""
        unwrap(model)
