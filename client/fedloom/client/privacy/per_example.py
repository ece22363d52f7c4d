"""Per-example gradients of adapter parameters in one backward pass.

Autograd would sum the gradient over the batch. Here the layers that own a trained parameter run through a
function that keeps its input and its output gradient, computes each example's gradient from the two, and
gives autograd none for the parameter: the same arithmetic as the summed gradient, done once. The result is
what Opacus's `DPOptimizer` reads, `parameter.grad_sample` of shape (batch, *parameter.shape), laid out as
views of one flat (batch, P) buffer so that a norm is one reduction and a clipped sum one product.

Only layers on the list below are accepted. A parameter whose gradient mixes examples (prompt tokens, batch
norm) would be clipped wrongly in silence, so everything else is refused by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedloom.proto.errors import ModelError

__all__ = ["Tape", "recording"]


class Tape:
    """Collects per-example gradients of a fixed list of parameters, one microbatch at a time."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        """The order of `parameters` is the order of the flat buffer's columns."""
        self.parameters = parameters
        self.columns: dict[nn.Parameter, slice] = {}
        width = 0
        for parameter in parameters:
            self.columns[parameter] = slice(width, width + parameter.numel())
            width += parameter.numel()
        self.width = width
        self.flat = torch.zeros(0, width)
        self._written: set[nn.Parameter] = set()

    def begin(self, batch: int) -> None:
        """Make room for `batch` examples; whatever was there is gone."""
        first = self.parameters[0]
        self.flat = torch.zeros(batch, self.width, dtype=torch.float32, device=first.device)
        self._written.clear()

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add to one parameter's gradients, shape (batch, *parameter.shape). A layer used twice adds twice."""
        if gradient.shape[0] != self.flat.shape[0]:
            raise ModelError(
                f"a trained layer saw {gradient.shape[0]} rows for {self.flat.shape[0]} examples: its gradient mixes "
                "examples and cannot be clipped per example; train other layers"
            )
        self.flat[:, self.columns[parameter]].add_(gradient.reshape(gradient.shape[0], -1))
        self._written.add(parameter)

    def finish(self) -> None:
        """Hand the gradients to the parameters as `grad_sample`.

        Raises:
            ModelError: A parameter took no part in the backward pass although there were examples.
        """
        if len(self.flat) and len(self._written) != len(self.parameters):
            missing = len(self.parameters) - len(self._written)
            raise ModelError(f"{missing} trained parameters got no gradient; they are not used by the model's forward")
        for parameter in self.parameters:
            view = self.flat[:, self.columns[parameter]]
            parameter.grad_sample = view.view(-1, *parameter.shape)  # type: ignore[attr-defined]  # Opacus's interface


class _Weight(torch.autograd.Function):
    """y = x Wᵀ; W's gradient goes to the tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, tape: Tape) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.parameter = tape, weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        if x.dim() == 2:
            per_example = torch.einsum("bo,bi->boi", grad.float(), x.float())
        else:
            batch = x.shape[0]
            rows, columns = grad.reshape(batch, -1, grad.shape[-1]), x.reshape(batch, -1, x.shape[-1])
            per_example = torch.bmm(rows.float().transpose(1, 2), columns.float())
        ctx.tape.add(ctx.parameter, per_example)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


class _Bias(torch.autograd.Function):
    """y = x + b; b's gradient goes to the tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: nn.Parameter, tape: Tape) -> torch.Tensor:
        ctx.tape, ctx.parameter = tape, bias
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grads
        ctx.tape.add(ctx.parameter, grad.float().reshape(grad.shape[0], -1, grad.shape[-1]).sum(1))
        return (grad if ctx.needs_input_grad[0] else None), None, None


# torch types `Function.apply` as untyped; named once here so that the calls below stay checked.
_weight: Any = _Weight.apply
_bias: Any = _Bias.apply


def _linear(module: nn.Linear, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    out: torch.Tensor = _weight(x, weight, tape) if weight.requires_grad else F.linear(x, weight)
    return _add_bias(out, module.bias, tape)


def _layer_norm(module: nn.LayerNorm, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    out = F.layer_norm(x, module.normalized_shape, module.weight, None, module.eps)
    return _add_bias(out, module.bias, tape)


def _add_bias(out: torch.Tensor, bias: nn.Parameter | None, tape: Tape) -> torch.Tensor:
    if bias is None:
        return out
    result: torch.Tensor = _bias(out, bias, tape) if bias.requires_grad else out + bias
    return result


def _forward_of(name: str, module: nn.Module) -> Any:
    """The recording forward of one layer.

    Raises:
        ModelError: The layer is of a kind whose per-example gradient is not known to be right.
    """
    if type(module) is nn.Linear:
        return _linear
    if type(module) is nn.LayerNorm and not (module.weight is not None and module.weight.requires_grad):
        return _layer_norm
    raise ModelError(
        f"layer {name!r} ({type(module).__name__}) owns a trained parameter but has no per-example gradient here; "
        "train linear layers, their biases, or LayerNorm biases"
    )


@contextmanager
def recording(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Tape]:
    """Route the layers that own `parameters` through the tape while the context lasts.

    Raises:
        ModelError: A trained parameter belongs to a layer that is not supported.
    """
    tape = Tape(parameters)
    wanted = set(parameters)
    patched: list[nn.Module] = []
    try:
        for name, module in model.named_modules():
            if any(parameter in wanted for parameter in module.parameters(recurse=False)):
                module.forward = partial(_forward_of(name, module), module, tape)
                patched.append(module)
        yield tape
    finally:
        for module in patched:
            del module.forward
        for parameter in parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus's interface
