"""PEQA: a weight is rounded to few bits, and its scales are trained (Kim et al., NeurIPS 2023, arXiv 2305.14152).

W = s ⊙ (Q - z) row by row, with Q in 0 to 2^bits - 1. Q and z come from W0 by rounding to the nearest and stay; s
moves. So the result's weights fit so few bits without further loss. The model starts as the rounded one, which is not
quite the base model. Nothing is packed while it trains, or in the result: the saving is for whoever packs that.
compute.quantization saves memory in training, under kinds that leave the base model alone.
"""

from typing import ClassVar, Literal

import torch
from peft import PeftModel
from torch import nn

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.adapters.wrapping import Wrapper, attach_around, matrix, plain, sizes, unwrap, wrapped_slots
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale
from fedloom.core.config.parsing import Section

__all__ = ["PEQA", "rounded"]


class _RoundedWeight(Wrapper):
    """y = (1 + d) ⊙ (W x) + b with W rounded; d, shape (out,), is the relative change of the scales: s = (1 + d) s0."""

    def __init__(self, inner: nn.Module, bits: int) -> None:
        super().__init__(inner)
        with torch.no_grad():
            matrix(inner).copy_(rounded(matrix(inner), bits))
        self.peqa_scale = nn.Parameter(torch.zeros(sizes(inner)[0]))

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y, bias = self.given(x), plain(self.inner).bias
        return y + scale(y if bias is None else y - bias, self.peqa_scale, tape)

    def fold(self) -> None:
        matrix(self.inner).mul_(1 + self.peqa_scale[:, None])


class PEQA(Section):
    """PEQA: the target layers' weights are rounded to few bits for good, and the scale of every row is trained.

    Trained parameters: one for each output of a target layer. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True, peft=False, starts_as_base=False)
    bits: Literal[4, 8] = 4
    """Bits of a weight's whole numbers; every row has a scale and a zero point besides."""
    targets: Targets = "auto"
    """Names (suffixes) of the linear layers, or as for LoRA; the paper takes all of them."""
    layers: Layers = None
    """Numbers of the transformer layers that get it: 0 is the first, -1 the last. None: all."""

    def attach(self, host: Host) -> PeftModel:
        """The base model with the weights of every target layer rounded, and changes of zero for their scales.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return attach_around(host, self.targets, lambda layer: _RoundedWeight(layer, self.bits), self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The relative changes of the scales of every target layer, shape (out,), role peqa_scale."""
        return wrapped_slots(model)

    def merge(self, model: PeftModel) -> None:
        """Multiply the rows of the weights."""
        unwrap(model)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest weight of 2^bits evenly spaced values a row, among them zero and the row's end.

    Args:
        weight: Shape (out, in), float32.
        bits: 4 or 8.
    """
    most = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / most
    step = torch.where(step > 0, step, torch.ones_like(step))  # a row of zeros stays one
    zero = (-low / step).round()
    return step * ((weight / step).round().add(zero).clamp(0, most) - zero)
