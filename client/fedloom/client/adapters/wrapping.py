"""A module around a layer of the base model: how a kind puts it there, finds it again and folds it in.

Its forward pass is written once, as `recorded`, which private training runs on a tape; see
`fedloom.client.privacy.dp_sgd.grad_sample.layers`. Without a tape the same operations leave the gradients to autograd.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.lora import Targets, carrier, linear_targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.slot import Slot
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.core.errors import ModelError
from fedloom.core.schema import Start, TensorSpec

__all__ = ["Wrapper", "attach_around", "matrix", "plain", "sizes", "unwrap", "wrapped_slots", "wrappers"]

_UNRECORDED = Tape([])


class Wrapper(nn.Module):
    """A layer of the base model, and trained parameters of its own: at their start its result is the layer's.

    A subclass makes the parameters, float32; an attribute's name is the role of its tensor. It defines `fold`, and
    `recorded` in its own class, from which private training takes it.
    """

    inner: nn.Module

    def __init__(self, inner: nn.Module) -> None:
        """Put it around a layer, which may sit in PEFT's carrier."""
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What `recorded` gives, outside private training."""
        return self.recorded(_UNRECORDED, x)

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer itself gives."""
        y: torch.Tensor = self.inner(x)
        return y

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        """The layer's result, shape (batch, ..., out), with each trained parameter's part in it on the tape."""
        raise NotImplementedError(f"{type(self).__name__} has no forward pass; define recorded(tape, x)")

    def fold(self) -> None:
        """Change the weight and the bias of `plain(inner)` such that it alone gives this module's result."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged; define fold()")


def attach_around(
    host: Host,
    targets: Targets,
    make: Callable[[nn.Module], Wrapper],
    layers: Layers = None,
    names: Iterable[str] | None = None,
) -> PeftModel:
    """A carrier of the head, with a wrapper around every target layer.

    Args:
        host: The base model.
        targets: The linear layers.
        make: Makes the wrapper of one layer, which is called with PEFT's module around it.
        layers: Numbers of the transformer layers that they are in; None is all.
        names: Full names of those of the targets that get a wrapper; None for all.

    Raises:
        ModelError: No layer has one of the target names, or as raised by `make`.
    """
    names = linear_targets(host.base, targets, host.head, layers) if names is None else names
    model = carrier(host, targets, layers=layers)
    for name in names:
        try:
            host.base.set_submodule(name, make(host.base.get_submodule(name)))
        except ValueError as error:
            raise ModelError(f"layer {name}: {error}") from None
    return model


def wrappers(model: PeftModel) -> list[tuple[str, Wrapper]]:
    """Every wrapper with its name in the base model, in model order."""
    named = model.get_base_model().named_modules()
    return [(name, module) for name, module in named if isinstance(module, Wrapper)]


def wrapped_slots(
    model: PeftModel, starts: Mapping[str, Start] | None = None, axes: Mapping[str, int] | None = None
) -> list[Slot]:
    """The parameters that wrappers own, in model order.

    Args:
        model: The model with its wrappers.
        starts: What tensors are before the first round, by role; zero if it is not here.
        axes: The axis that is the rank, by role; a role that is not here has none.
    """
    found: list[Slot] = []
    for name, module in wrappers(model):
        for role, each in module.named_parameters(recurse=False):
            start, axis = (starts or {}).get(role, Start.ZERO), (axes or {}).get(role)
            found.append(Slot(TensorSpec(f"{name}.{role}", name, role, tuple(each.shape), start, axis), each))
    return found


@torch.no_grad()
def unwrap(model: PeftModel) -> None:
    """Fold every wrapper into its layer, and leave the layer alone in its place."""
    for name, module in wrappers(model):
        module.fold()
        model.get_base_model().set_submodule(name, module.inner)


def plain(layer: nn.Module) -> Any:
    """The base model's own layer, with a weight and perhaps a bias; PEFT's carrier may be around it."""
    return getattr(layer, "base_layer", layer)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, whose weight may be packed into 4 bits."""
    inside = plain(layer)
    if isinstance(inside, Conv1D):
        inputs, outputs = inside.weight.shape
        return outputs, inputs
    return inside.out_features, inside.in_features


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out, in), which writing to changes the layer; Conv1D stores it transposed."""
    inside = plain(layer)
    weight: torch.Tensor = inside.weight
    return weight.t() if isinstance(inside, Conv1D) else weight
