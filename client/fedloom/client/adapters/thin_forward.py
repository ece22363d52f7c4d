"""PEFT's forward pass of a low-rank pair with fewer passes over the activations."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["thin_forward"]

_PAIR = "default"
"""PEFT's name of an adapter that was given none."""


def thin_forward(model: nn.Module) -> None:
    """Have plain pairs computed as W0 x + B (s A x), where PEFT computes W0 x + s (B A x).

    The scale then goes over r values for each token and not over all outputs, in the backward pass too, and the sum
    takes the place of its first term. Where the scale is a power of two the result is bit for bit PEFT's. DoRA, layers
    of other kinds and input that is not float32 keep PEFT's own pass, as do calls with options of PEFT's.
    """
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer):
            # Set beside the class's method, as for layers that are recomputed: the tape changes A and B within.
            layer.forward = partial(_forward, layer)


def _is_plain(layer: Linear) -> bool:
    base = layer.get_base_layer()
    return (
        list(layer.lora_A) == [_PAIR]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[_PAIR], nn.Identity)
        and type(base) in (nn.Linear, Conv1D)  # whose result nothing else holds, so that it can be added to
    )


def _forward(layer: Linear, x: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
    if given or options or layer.disable_adapters or layer.merged or x.dtype != torch.float32:
        result: torch.Tensor = type(layer).forward(layer, x, *given, **options)
        return result
    low = layer.lora_A[_PAIR](x) * layer.scaling[_PAIR]
    whole: torch.Tensor = layer.base_layer(x)
    return whole.add_(layer.lora_B[_PAIR](low))
