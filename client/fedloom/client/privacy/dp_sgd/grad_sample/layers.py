"""How each kind of layer is recorded, and how to add one.

A recorded forward computes what the layer's own forward computes, but each trained parameter enters it through one
of four operations that put its per-example gradient on the tape:

    product(x, weight, tape)    y = x Wᵀ over the last axis
    scale(x, weight, tape)      y = x · w, element by element over the last axes
    shift(x, bias, tape)        y = x + b, likewise
    sparse_product(x, entries, places, out, tape)   y = x Sᵀ, where S is zero but for some entries

To add a layer, write its forward with them and list it under its exact type:

    def _t5_norm(module, tape, x):
        return scale(F.rms_norm(x, module.weight.shape, None, module.variance_epsilon), module.weight, tape)

    LAYERS[T5LayerNorm] = _t5_norm

A layer of your own, such as an adapter kind brings, carries it as a method of its class:

    class Gain(nn.Module):
        def forward(self, x):
            return x * self.gain

        def recorded(self, tape, x):
            return scale(x, self.gain, tape)

Three things must hold, and a test against a naive loop over the examples shows that they do:

- The first axis of `x` is the examples, in every call: a layer that sees the batch reshaped to (batch · tokens, d)
  is refused at the first backward pass.
- Each row of the result depends on the same row of `x` alone.
- A trained parameter enters through these operations only: what reaches it by another way is refused too.

A subclass has neither the entry nor the method of its base class: it may compute something else.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedloom.client.privacy.dp_sgd.grad_sample.tape import Tape

__all__ = ["LAYERS", "Forward", "is_rms_norm", "product", "rule", "scale", "shift", "sparse_product"]

Forward = Callable[..., torch.Tensor]
"""Called with the layer, the tape, and what the layer's own forward is called with."""


class _Product(torch.autograd.Function):
    """y = x Wᵀ, or x W; W's gradient goes to the tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, tape: Tape, transposed: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.parameter, ctx.transposed = tape, weight, transposed
        return x @ weight if transposed else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        left, right = (x, grad) if ctx.transposed else (grad, x)
        ctx.tape.add_product(ctx.parameter, left, right)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return grad @ (weight.t() if ctx.transposed else weight), None, None, None


class _Scale(torch.autograd.Function):
    """y = x · w; w's gradient goes to the tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, tape: Tape) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.parameter = tape, weight
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        ctx.tape.add(ctx.parameter, _summed(grad.float() * x.float(), ctx.parameter))
        return ((grad * weight).to(x.dtype) if ctx.needs_input_grad[0] else None), None, None


class _Shift(torch.autograd.Function):
    """y = x + b; b's gradient goes to the tape, example by example."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: nn.Parameter, tape: Tape) -> torch.Tensor:
        ctx.tape, ctx.parameter, ctx.dtype = tape, bias, x.dtype
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grads
        ctx.tape.add(ctx.parameter, _summed(grad.float(), ctx.parameter))
        return (grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None), None, None


class _SparseProduct(torch.autograd.Function):
    """y = x Sᵀ; the gradient of S's entries goes to the tape, example by example."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, entries: nn.Parameter, places: torch.Tensor, outputs: int, tape: Tape
    ) -> torch.Tensor:
        ctx.save_for_backward(x, entries, places)
        ctx.tape, ctx.parameter, ctx.outputs = tape, entries, outputs
        return F.linear(x, _dense(entries, places, outputs, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (grad,) = grads
        x, entries, places = ctx.saved_tensors
        # A dense matrix for one example at a time: all of them would take a batch's worth of weights.
        lefts, rights = (each.float().reshape(len(each), -1, each.shape[-1]) for each in (grad, x))
        rows = [(left.t() @ right).flatten()[places] for left, right in zip(lefts, rights, strict=True)]
        ctx.tape.add(ctx.parameter, torch.stack(rows))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return grad @ _dense(entries, places, ctx.outputs, x.shape[-1]), None, None, None, None


def _dense(entries: torch.Tensor, places: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The matrix (outputs, inputs) that has `entries` at `places`, counted row by row, and is zero elsewhere."""
    return entries.new_zeros(outputs * inputs).index_put((places,), entries).view(outputs, inputs)


def _summed(grad: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Sum within each example: (batch, ..., *parameter.shape) gives (batch, *parameter.shape)."""
    return grad.reshape(len(grad), -1, *parameter.shape).sum(1)


# torch types `Function.apply` as untyped; named once here so that the calls below stay checked.
_product: Any = _Product.apply
_scale: Any = _Scale.apply
_shift: Any = _Shift.apply
_sparse: Any = _SparseProduct.apply


def product(x: torch.Tensor, weight: torch.Tensor, tape: Tape, *, transposed: bool = False) -> torch.Tensor:
    """Give x Wᵀ over the last axis of `x`, shape (batch, ..., in), or x W; record it if the tape has `weight`."""
    if weight in tape.columns:
        recorded: torch.Tensor = _product(x, weight, tape, transposed)
        return recorded
    return x @ weight if transposed else F.linear(x, weight)


def scale(x: torch.Tensor, weight: torch.Tensor, tape: Tape) -> torch.Tensor:
    """Give x · w over the last axes of `x`, shape (batch, ..., *weight.shape); record it if the tape has `weight`."""
    result: torch.Tensor = _scale(x, weight, tape) if weight in tape.columns else x * weight
    return result


def shift(x: torch.Tensor, bias: torch.Tensor | None, tape: Tape) -> torch.Tensor:
    """Give x + b over the last axes of `x`, shape (batch, ..., *bias.shape); record it if the tape has `bias`."""
    if bias is None:
        return x
    result: torch.Tensor = _shift(x, bias, tape) if bias in tape.columns else x + bias
    return result


def sparse_product(
    x: torch.Tensor, entries: torch.Tensor, places: torch.Tensor, outputs: int, tape: Tape
) -> torch.Tensor:
    """Give x Sᵀ over the last axis of `x`, shape (batch, ..., in); record it if the tape has `entries`.

    Args:
        x: Shape (batch, ..., in).
        entries: The values of S that are not zero, shape (k,).
        places: Where they are in S, counted row by row, shape (k,), int64, each at most once.
        outputs: Rows of S.
        tape: Where per-example gradients go.
    """
    if entries in tape.columns:
        recorded: torch.Tensor = _sparse(x, entries, places, outputs, tape)
        return recorded
    return F.linear(x, _dense(entries, places, outputs, x.shape[-1]))


def _linear(module: nn.Linear, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    return shift(product(x, module.weight, tape), module.bias, tape)


def _conv1d(module: Any, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    return shift(product(x, module.weight, tape, transposed=True), module.bias, tape)


def _layer_norm(module: nn.LayerNorm, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    if module.weight is None or module.weight not in tape.columns:
        return shift(F.layer_norm(x, module.normalized_shape, module.weight, None, module.eps), module.bias, tape)
    normalised = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    return shift(scale(normalised, module.weight, tape), module.bias, tape)


def _rms_norm(module: nn.Module, tape: Tape, x: torch.Tensor, *given: Any) -> torch.Tensor:
    """Any norm whose result is n · w, or n · (1 + w) as Gemma's: f(0) + (f(1) - f(0)) · w, by its own forward f."""
    weight: Any = module.weight
    if weight not in tape.columns:
        plain: torch.Tensor = type(module).forward(module, x, *given)
        return plain
    least, most = (_with_weight(module, fill(weight))(x, *given) for fill in (torch.zeros_like, torch.ones_like))
    return least + scale(most - least, weight, tape)


def _with_weight(module: nn.Module, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The forward of the module's class with another weight; the module itself is left as it is."""
    twin = copy.copy(module)
    twin._parameters = {}
    twin.__dict__["weight"] = weight
    return partial(type(module).forward, twin)


def _dora(module: DoraLinearLayer, tape: Tape, x: torch.Tensor, **given: Any) -> torch.Tensor:
    """What PEFT adds to a layer's result, as it computes it: m ⊙ V x / ‖V‖ - W0 x.

    ‖V‖ is a constant to the gradient, as in section 4.3 of the paper, and the same for every example.
    """
    layer, scaling, a, b = (given[name] for name in ("base_layer", "scaling", "lora_A", "lora_B"))
    weight, pair = dequantize_module_weight(layer), (b.weight @ a.weight).detach()
    norms = module.get_weight_norm(weight.to(x.dtype), pair.to(x.dtype), scaling).detach()
    plain: torch.Tensor = given["base_result"] if layer.bias is None else given["base_result"] - layer.bias
    return scale((plain + scaling * b(a(x))) / norms, module.weight, tape) - plain


LAYERS: dict[type[nn.Module], Forward] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.LayerNorm: _layer_norm,
    DoraLinearLayer: _dora,
}
"""The recorded forward of each kind of layer. Conv1D is GPT-2's linear layer, whose weight is (in, out); PEFT's layer
has DoRA's magnitudes, and the pair beside it is recorded by itself."""


def rule(kind: type[nn.Module]) -> Forward | None:
    """The recorded forward of exactly this kind of layer: from `LAYERS`, or the method `recorded` of its own class.

    The RMS norms of transformers have one rule, since each model has a class of its own for them.
    """
    found: Forward | None = LAYERS.get(kind) or vars(kind).get("recorded") or (_rms_norm if is_rms_norm(kind) else None)
    return found


def is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether this is torch's RMS norm, or one of transformers' own (Zhang and Sennrich, 2019, arXiv 1910.07467)."""
    theirs = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")
    return theirs or kind is nn.RMSNorm
