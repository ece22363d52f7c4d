"""What a backward pass leaves behind: every example's gradient, formed or as two factors."""

from typing import Any

import torch
from torch import nn

from fedloom.proto.errors import ModelError

__all__ = ["Tape"]


class Tape:
    """Collects per-example gradients of a fixed list of parameters, one microbatch at a time.

    The gradient of a weight matrix is a product of two factors that hold T rows for each example (T tokens): the
    layer's input and its output gradient. The tape keeps whichever is smaller, the product (LoRA's matrices, when T
    is above their rank) or the factors (a head, whose T is 1; a matrix over the vocabulary). So it never holds more
    than the activations that the backward pass has just let go of, whatever the number of parameters.
    (Bu et al., ICML 2023, arXiv 2210.00038, call the second way book-keeping.)
    """

    def __init__(self, parameters: list[nn.Parameter], names: dict[nn.Parameter, str] | None = None) -> None:
        """The order of `parameters` is the order of the columns; `names` are for messages."""
        self.parameters = parameters
        self.names = names or {}
        self.columns: dict[nn.Parameter, slice] = {}
        width = 0
        for parameter in parameters:
            self.columns[parameter] = slice(width, width + parameter.numel())
            width += parameter.numel()
        self.width = width
        self.batch = 0
        self._formed: dict[nn.Parameter, torch.Tensor] = {}
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, batch: int) -> None:
        """Expect the gradients of `batch` examples; whatever was there is gone."""
        self.batch = batch
        self.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def clear(self) -> None:
        """Let go of the gradients."""
        self._formed.clear()
        self._factors.clear()

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add to one parameter's gradients, shape (batch, *parameter.shape). A layer used twice adds twice.

        Raises:
            ModelError: The first axis is not the examples'.
        """
        self._check(parameter, len(gradient))
        gradient = gradient.float().reshape(self.batch, *parameter.shape)
        if parameter in self._formed:
            self._formed[parameter].add_(gradient)
        else:
            self._formed[parameter] = gradient

    def add_product(self, parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the gradients leftᵀ·right of a matrix (m, n).

        Args:
            parameter: The matrix.
            left: Shape (batch, ..., m); a layer's output gradient, say.
            right: Shape (batch, ..., n), the same in between; its input.

        Raises:
            ModelError: The first axis is not the examples'.
        """
        self._check(parameter, len(left))
        # Detached, because an input that is kept with its history would keep the whole graph.
        left, right = (each.detach().reshape(self.batch, -1, each.shape[-1]) for each in (left, right))
        if parameter in self._factors:
            earlier = self._factors.pop(parameter)
            left, right = torch.cat([earlier[0], left], 1), torch.cat([earlier[1], right], 1)
        rows, columns = parameter.shape
        if parameter not in self._formed and left.shape[1] * (rows + columns) < rows * columns:
            self._factors[parameter] = (left, right)
        else:
            self.add(parameter, _multiply(left, right))

    def _check(self, parameter: nn.Parameter, rows: int) -> None:
        if rows != self.batch:
            raise ModelError(
                f"trained layer {self._name(parameter)} saw {rows} rows for {self.batch} examples: its gradient mixes "
                "examples and cannot be clipped per example; train other layers"
            )

    def _name(self, parameter: nn.Parameter) -> str:
        return repr(self.names.get(parameter, "without a name"))

    def finish(self) -> None:
        """Check that the backward pass is complete.

        Raises:
            ModelError: A parameter took no part in it although there were examples, or took part outside its layer.
        """
        outside = [parameter for parameter in self.parameters if parameter.grad is not None]
        if outside:
            raise ModelError(
                f"{len(outside)} trained parameters are used outside their layer's own forward, such as "
                f"{self._name(outside[0])}: their gradient is summed over the batch there; train other layers"
            )
        self._check_complete()

    def _check_complete(self) -> None:
        missing = [each for each in self.parameters if each not in self._formed and each not in self._factors]
        if self.batch and missing:
            raise ModelError(
                f"{len(missing)} trained parameters got no gradient, such as {self._name(missing[0])}; the model's "
                "forward does not use them, or their layer was recomputed without input gradients: with "
                "reentrant checkpointing call enable_input_require_grads() on the model"
            )

    def norms(self) -> torch.Tensor:
        """L2 norm of each example's gradient over all parameters, shape (batch,), float32."""
        parts = [torch.linalg.vector_norm(each.flatten(1), dim=1) for each in self._formed.values()]
        parts += [_product_norms(left, right) for left, right in self._factors.values()]
        if not parts:
            return torch.zeros(self.batch, device=self.parameters[0].device)
        whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return whole

    def drop(self, examples: torch.Tensor) -> None:
        """Set the gradients of some examples to zero, even if they are not finite; `examples` is a mask (batch,)."""
        for gradient in self._formed.values():
            gradient[examples] = 0.0
        for parameter, (left, right) in self._factors.items():
            mask = examples[:, None, None]
            self._factors[parameter] = left.masked_fill(mask, 0.0), right.masked_fill(mask, 0.0)

    def add_weighted_sum(self, weights: torch.Tensor, total: torch.Tensor) -> None:
        """Add the sum over examples of weight times gradient to `total`, shape (width,), float32."""
        for parameter, gradient in self._formed.items():
            total[self.columns[parameter]].addmv_(gradient.flatten(1).t(), weights)
        for parameter, (left, right) in self._factors.items():
            weighted = (left.float() * weights[:, None, None]).flatten(0, 1)
            total[self.columns[parameter]].view(parameter.shape).addmm_(weighted.t(), right.float().flatten(0, 1))

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """One parameter's gradients, shape (batch, *parameter.shape), float32; formed now if need be."""
        if parameter in self._factors:
            return _multiply(*self._factors[parameter])
        if parameter in self._formed:
            return self._formed[parameter]
        return torch.zeros(self.batch, *parameter.shape, device=parameter.device)

    @property
    def flat(self) -> torch.Tensor:
        """All gradients, shape (batch, width), float32; formed now, for a look at them rather than for training."""
        return torch.cat([self.gradient(parameter).flatten(1) for parameter in self.parameters], dim=1)

    def publish(self) -> None:
        """Hand the gradients to any of Opacus's optimizers, as `parameter.grad_sample`."""
        for parameter in self.parameters:
            parameter.grad_sample = self.gradient(parameter)  # type: ignore[attr-defined]  # Opacus's interface

    def withdraw(self) -> None:
        """Take back what was handed over, and what Opacus made of it."""
        for parameter in self.parameters:
            parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]  # Opacus's interface


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ·right for each example: (batch, T, m) and (batch, T, n) give (batch, m, n) in float32."""
    return torch.bmm(left.float().transpose(1, 2), right.float())


def _product_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Norm of each example's leftᵀ·right, shape (batch,), without all products in memory at once.

    The way through Gram matrices (T² per example) would need no product at all, but its sum cancels: a norm that
    comes out too small is an example that is clipped too little.
    """
    norm: Any = torch.linalg.vector_norm
    if left.shape[1] == 1:
        outer: torch.Tensor = norm(left.float(), dim=(1, 2)) * norm(right.float(), dim=(1, 2))
        return outer
    # As many products at a time as take the room of the factors themselves.
    per_example = left.shape[2] * right.shape[2]
    count = max(1, (left.numel() + right.numel()) // per_example)
    parts = zip(torch.split(left, count), torch.split(right, count), strict=True)
    return torch.cat([norm(_multiply(*part), dim=(1, 2)) for part in parts])
