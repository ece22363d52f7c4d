"""Opacus's own hooks behind the tape's interface: the reference, and the way for kinds of layers only they know."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from fedloom.client.privacy.dp_sgd.grad_sample.owners import names_of, owners
from fedloom.client.privacy.dp_sgd.grad_sample.tape import Tape
from fedloom.core.errors import ModelError

__all__ = ["HOOKED", "hooked"]

HOOKED = frozenset({nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Linear})
"""Kinds for which Opacus has a rule written by hand that our tests found equal to a naive loop. Its fallback for all
others traces the layer and is silent where a layer's first axis is not the examples'."""


class _HookTape(Tape):
    """Takes `grad_sample`, which the hooks leave on the parameters, when the backward pass is over."""

    layers: Collection[nn.Module] = ()

    def begin(self, batch: int, sequences: int = 1) -> None:
        super().begin(batch, sequences)
        # A pass that ended half-way has left inputs of other examples on the layers, and counts of uses still to come.
        for layer in self.layers:
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for each in self.parameters:
            parameter: Any = each  # Opacus's interface
            parameter.grad_sample, parameter._forward_counter = None, 0
            parameter.__dict__.pop("_current_grad_sample", None)

    def finish(self) -> None:
        for parameter in self.parameters:
            sample: Any = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus's interface
            if isinstance(sample, torch.Tensor):
                self.add(parameter, sample)
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]  # Opacus's interface
        self._check_complete()


@contextmanager
def hooked(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tape]:
    """Like `recording`, by Opacus's `GradSampleHooks` on the unwrapped model.

    Not with `checkpoint(..., use_reentrant=False)`, whose recomputation the hooks do not see: the first backward pass
    is refused there.

    Raises:
        ModelError: A trained parameter belongs to a layer that is not in `HOOKED`, or another parameter of the model
            requires gradients.
    """
    names = names_of(model, parameters)
    layers = owners(model, names, HOOKED.__contains__).values()
    others = [name for name, each in model.named_parameters() if each.requires_grad and each not in names]
    if others:
        raise ModelError(f"{others[0]!r} requires gradients but is not trained; Opacus's hooks need it frozen")
    modes = [module.training for module in layers]
    tape = _HookTape(parameters, names)
    tape.layers = layers
    hooks = GradSampleHooks(model, loss_reduction="sum", strict=False)
    try:
        for module in layers:
            module.training = True  # the hooks record in training mode only; these kinds compute the same in both
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield tape
    finally:
        for module, mode in zip(layers, modes, strict=True):
            module.training = mode
        hooks.cleanup()
        tape.withdraw()
