"""Scale and shift what linear layers give: y = (1 + scale) x + shift (SSF, Lian et al., NeurIPS 2022, 2210.08823)."""

from typing import ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets, carrier, linear_targets
from fedloom.client.adapters.slot import Slot
from fedloom.client.privacy.dp_sgd.grad_sample import Tape, scale, shift
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError
from fedloom.core.schema import Start, TensorSpec

__all__ = ["ScaleShift", "plain"]


class _Scaled(nn.Module):
    def __init__(self, inner: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.inner, start = inner, torch.zeros_like(bias, dtype=torch.float32)
        self.scale, self.shift = nn.Parameter(start), nn.Parameter(start.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return (y + y * self.scale + self.shift).to(y.dtype)

    def recorded(self, tape: Tape, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return shift(y + scale(y, self.scale, tape), self.shift, tape).to(y.dtype)


class ScaleShift(Section):
    """Scale and shift each output of chosen linear layers."""

    traits: ClassVar[Traits] = Traits(exact_average=True, peft=False)
    targets: Targets = ("query", "value")
    """Names (suffixes) of the linear layers; each must have a bias, which takes up the shift."""

    def attach(self, host: Host) -> PeftModel:
        names = linear_targets(host.base, self.targets, host.head)
        if bare := [name for name in names if host.base.get_submodule(name).bias is None]:
            raise ModelError(f"{bare[0]} has no bias that could take up a shift; name other layers as adapter.targets")
        model = carrier(host, self.targets)
        for name in names:
            layer = host.base.get_submodule(name)
            host.base.set_submodule(name, _Scaled(layer, plain(layer).bias))
        return model

    def slots(self, model: PeftModel) -> list[Slot]:
        return [
            Slot(TensorSpec(f"{name}.{role}", name, role, tuple(each.shape), Start.ZERO), each)
            for name, module in _scaled(model)
            for role, each in module.named_parameters(recurse=False)
        ]

    @torch.no_grad()
    def merge(self, model: PeftModel) -> None:
        for name, module in _scaled(model):
            layer, factor = plain(module.inner), 1 + module.scale
            layer.weight.mul_(factor if isinstance(layer, Conv1D) else factor[:, None])
            layer.bias.mul_(factor).add_(module.shift)
            model.get_base_model().set_submodule(name, module.inner)


def plain(layer: nn.Module) -> nn.Linear | Conv1D:
    """The base model's own layer, inside PEFT's carrier."""
    inside = layer.get_submodule("base_layer")
    assert isinstance(inside, nn.Linear | Conv1D)  # the carrier takes no others
    return inside


def _scaled(model: PeftModel) -> list[tuple[str, _Scaled]]:
    return [(name, each) for name, each in model.get_base_model().named_modules() if isinstance(each, _Scaled)]
