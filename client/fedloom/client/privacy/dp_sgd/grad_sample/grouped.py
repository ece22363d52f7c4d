"""One forward and backward pass over the examples of several models that differ in their adapters alone.

What is frozen sees all rows at once. A layer with a parameter of the adapter sees each model's rows with that model's
values: linear layers as one batched product where all have as many rows, as of LoRA's factors for several adapters at
once (Sheng et al., "S-LoRA", MLSys 2024, arXiv 2311.03285), others and unequal ones model by model. A per-example
gradient goes to the tape of the model whose example it is, so that nothing of one model's clip knows of another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.nn import functional as F

from fedloom.client.privacy.dp_sgd.grad_sample.layers import rule, shift
from fedloom.client.privacy.dp_sgd.grad_sample.tape import Tape
from fedloom.core.errors import ModelError

__all__ = ["Layers", "adapter_layers", "grouped"]

Layers = tuple[nn.Module, ...]
"""The layers that hold the parameters of one model's adapter, in model order."""


def adapter_layers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Layers:
    """The outermost layers that hold `parameters`; each must be called with one tensor alone, as recorded ones are.

    Raises:
        ModelError: One is of a kind whose rows cannot be shared out among models.
    """
    mine = set(parameters)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if mine.isdisjoint(module.parameters(recurse=False)) or any(name.startswith(f"{each}.") for each in found):
            continue
        if rule(type(module)) is None or type(module) is DoraLinearLayer:
            raise ModelError(
                f"engine.one_pass = true cannot share out layer {name!r} ({type(module).__name__}) among clients; "
                "choose another adapter.kind, leave adapter.dora out, or set engine.one_pass = false"
            )
        found[name] = module
        mine.difference_update(module.parameters())
    if mine:
        raise ModelError(
            f"engine.one_pass = true cannot share out {len(mine)} parameters of the adapter, which belong to no layer; "
            "choose another adapter or set engine.one_pass = false"
        )
    return tuple(found.values())


@contextmanager
def grouped(layers: Sequence[Layers], rows: Sequence[int], tapes: Sequence[Tape] | None) -> Iterator[None]:
    """Passes of the first model within compute with the adapters of all, each on its rows of the batch.

    Args:
        layers: Of each model; frozen parameters are those of the first.
        rows: How many rows of the batch are each model's, which lie together, in the order of the models.
        tapes: Of each model, under whose `recording` it is at this moment. None without privacy: autograd then adds to
            the gradients of each model's parameters.

    Raises:
        ModelError: A layer sees the batch in another shape than (examples, ..., values).
    """
    if len(layers) == 1:
        yield
        return
    before = [vars(layer).get("forward") for layer in layers[0]]
    try:
        for alike in zip(*layers, strict=True):
            forwards = [each.forward for each in alike]
            alike[0].forward = partial(_forward, alike, forwards, list(rows), tapes)
        yield
    finally:
        for layer, forward in zip(layers[0], before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _forward(
    layers: Sequence[Any], forwards: Sequence[Any], rows: list[int], tapes: Sequence[Tape] | None, x: torch.Tensor
) -> torch.Tensor:
    if len(x) != sum(rows):
        raise ModelError(
            f"a {type(layers[0]).__name__} of the adapter saw {len(x)} rows for {sum(rows)} examples, so that nobody "
            "knows whose they are; set engine.one_pass = false"
        )
    if type(layers[0]) is nn.Linear and layers[0].weight.data_ptr() == layers[1].weight.data_ptr():
        return _shifted(
            layers, tapes, torch.split(F.linear(x, layers[0].weight), rows)
        )  # frozen, with a bias that is trained
    if type(layers[0]) is nn.Linear and len(set(rows)) == 1:
        return _linear(layers, rows, tapes, x)
    return torch.cat([forward(part) for forward, part in zip(forwards, torch.split(x, rows), strict=True)])


def _linear(layers: Sequence[Any], rows: list[int], tapes: Sequence[Tape] | None, x: torch.Tensor) -> torch.Tensor:
    weights = [each.weight for each in layers]
    recorded = tapes is not None and weights[0] in tapes[0].columns
    y: torch.Tensor = _products(x, tapes, *weights) if recorded else _product(x, torch.stack(weights).transpose(1, 2))
    return y if layers[0].bias is None else _shifted(layers, tapes, torch.split(y, rows))


def _shifted(layers: Sequence[Any], tapes: Sequence[Tape] | None, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts with each layer's bias added to its own, as one."""
    if tapes is None:
        return torch.cat([part + each.bias for part, each in zip(parts, layers, strict=True)])
    return torch.cat([shift(part, each.bias, tape) for part, each, tape in zip(parts, layers, tapes, strict=True)])


def _product(x: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """(groups · batch, ..., n) times (groups, n, m) gives (groups · batch, ..., m), group by group."""
    grouped_rows = x.reshape(len(stack), -1, x.shape[-1])
    return torch.bmm(grouped_rows, stack).reshape(*x.shape[:-1], stack.shape[-1])


class _Products(torch.autograd.Function):
    """y = x Wᵀ with a W for each group of rows; each W's gradient goes to its tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tapes: Sequence[Tape], *weights: nn.Parameter) -> torch.Tensor:
        stack = torch.stack(weights)
        ctx.save_for_backward(x, stack)
        ctx.tapes, ctx.parameters = tapes, weights
        return _product(x, stack.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, stack = ctx.saved_tensors
        parts = zip(ctx.tapes, ctx.parameters, grad.chunk(len(stack)), x.chunk(len(stack)), strict=True)
        for tape, parameter, left, right in parts:
            tape.add_product(parameter, left, right)
        return (_product(grad, stack) if ctx.needs_input_grad[0] else None, None, *[None] * len(stack))


_products: Any = _Products.apply
