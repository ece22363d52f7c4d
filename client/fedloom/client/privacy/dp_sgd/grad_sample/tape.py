"""What a backward pass leaves behind: every example's gradient, formed or as two factors."""

from collections.abc import Iterator

import torch
from torch import nn

from fedloom.core.errors import ModelError

__all__ = ["Tape"]

_MOST = 1024
"""Examples whose rounded gradients are added in 32 bits; values whose squares are added in float32."""


class Tape:
    """Collects per-example gradients of a fixed list of parameters, one microbatch at a time.

    The gradient of a weight matrix is a product of two factors that hold T rows for each example (T tokens): the
    layer's input and its output gradient. The tape keeps whichever is smaller, the product (LoRA's matrices, when T
    is above their rank) or the factors (a head, whose T is 1; a matrix over the vocabulary). So it never holds more
    than the activations that the backward pass has just let go of, whatever the number of parameters.
    (Bu et al., ICML 2023, arXiv 2210.00038, call the second way book-keeping.)
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        names: dict[nn.Parameter, str] | None = None,
        flattened: frozenset[nn.Parameter] = frozenset(),
    ) -> None:
        """Begin with nothing.

        Args:
            parameters: Their order is that of the columns.
            names: For messages.
            flattened: Those whose layers may see several rows in turn for each example, see `layouts`.
        """
        self.parameters = parameters
        self.names = names or {}
        self.flattened = flattened
        self.columns: dict[nn.Parameter, slice] = {}
        width = 0
        for parameter in parameters:
            self.columns[parameter] = slice(width, width + parameter.numel())
            width += parameter.numel()
        self.width = width
        self.batch, self.rows = 0, 0
        self._formed: dict[nn.Parameter, torch.Tensor] = {}
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, batch: int, sequences: int = 1) -> None:
        """Expect the gradients of `batch` examples; whatever was there is gone.

        Args:
            batch: Examples.
            sequences: Rows of the model's batch that are one example, one after the other; an example's gradient is
                the sum over them.
        """
        self.batch, self.rows = batch, batch * sequences
        self.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def clear(self) -> None:
        """Let go of the gradients."""
        self._formed.clear()
        self._factors.clear()

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add to one parameter's gradients, shape (rows, *parameter.shape). A layer used twice adds twice.

        Of a flattened parameter there may be several for each example, which are added up.

        Raises:
            ModelError: The first axis is not the examples'.
        """
        self._check(parameter, len(gradient))
        gradient = gradient.float()
        if len(gradient) != self.batch:
            gradient = gradient.reshape(self.batch, -1, *parameter.shape).sum(1)
        self._add(parameter, gradient.reshape(self.batch, *parameter.shape))

    def _add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add gradients of the examples, float32, shape (batch, *parameter.shape)."""
        if parameter in self._formed:
            self._formed[parameter].add_(gradient)
        else:
            self._formed[parameter] = gradient

    def add_product(self, parameter: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the gradients leftᵀ·right of a matrix (m, n).

        Args:
            parameter: The matrix.
            left: Shape (rows, ..., m); a layer's output gradient, say. Of a flattened parameter (rows · k, ..., m).
            right: Shape (rows, ..., n), the same in between; its input.

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
            self._add(parameter, _multiply(left, right))

    def _check(self, parameter: nn.Parameter, rows: int) -> None:
        in_turn = parameter in self.flattened and self.rows and not rows % self.rows
        if rows != self.rows and not in_turn:
            raise ModelError(
                f"trained layer {self._name(parameter)} saw {rows} rows for {self.rows} of the batch: its gradient "
                "mixes examples and cannot be clipped per example; train other layers"
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
        """L2 norm of each example's gradient over all parameters, shape (batch,), float32.

        Within 2^-11 of the norm of the very values that `add_rounded_sum` adds: see `_norms`.
        """
        parts = [_norms(each) for each in self._formed.values()]
        parts += [_product_norms(left, right) for left, right in self._factors.values()]
        return _norms(torch.stack(parts, 1)) if parts else torch.zeros(self.batch, device=self.parameters[0].device)

    def add_rounded_sum(self, scales: torch.Tensor, total: torch.Tensor) -> None:
        """Add round(scale times gradient), summed over the examples without any error, to `total`.

        Args:
            scales: Shape (batch,), float32; each brings its example's gradient to a norm of at most 2^20. An example
                whose scale is 0 or not a number adds nothing, even if its gradient is not finite.
            total: Shape (width,), int64.
        """
        for parameter, gradient in self._formed.items():
            for part, scale in zip(*(torch.split(each, _MOST) for each in (gradient.flatten(1), scales)), strict=True):
                _add_rounded(part * scale[:, None], total[self.columns[parameter]])
        for parameter, (left, right) in self._factors.items():
            for part, product in _products(left, right):
                _add_rounded(product.flatten(1).mul_(scales[part, None]), total[self.columns[parameter]])

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
    if left.shape[1] == 1:
        return left.float().transpose(1, 2) * right.float()  # exact but for rounding once, whatever a matmul may do
    return torch.bmm(left.float().transpose(1, 2), right.float())


def _add_rounded(scaled: torch.Tensor, total: torch.Tensor) -> None:
    """Round (n, m) in place, n up to `_MOST`, and add the sum over the first axis to `total`."""
    # Infinity times 0 is NaN; an integer made of one would be whatever the processor says.
    scaled.nan_to_num_(0.0, 0.0, 0.0)
    # In float32 a whole number up to 2^24 is exact, and `_MOST` of up to 2^20 each add up to less than 2^31.
    total += scaled.round_().to(torch.int32).sum(0, dtype=torch.int32)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """L2 norm of each example's values, shape (batch,).

    In whatever order n squares are added in float32, their sum is within n·2^-24 of itself. So no more than 1024 are
    added at a time, and the norms of the parts are values to take the norm of.
    """
    rows = rows.flatten(1)
    while rows.shape[1] > _MOST:
        rows = torch.cat([torch.linalg.vector_norm(each, dim=2) for each in _cut(rows)], dim=1)
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norm


def _cut(rows: torch.Tensor) -> list[torch.Tensor]:
    """(batch, n) as (batch, n // _MOST, _MOST) and the rest, (batch, 1, n % _MOST)."""
    whole = rows.shape[1] // _MOST * _MOST
    parts = rows[:, :whole].reshape(len(rows), whole // _MOST, _MOST), rows[:, None, whole:]
    return [each for each in parts if each.shape[2]]


def _products(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each example's leftᵀ·right, for as many examples at a time as take the room of the factors themselves.

    Called twice with the same factors it makes the same calls, so that what is added is what was measured.
    """
    room = (left.numel() + right.numel()) // (left.shape[2] * right.shape[2])
    count = min(max(1, room), _MOST)
    for start in range(0, len(left), count):
        part = slice(start, start + count)
        yield part, _multiply(left[part], right[part])


def _product_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Norm of each example's leftᵀ·right, shape (batch,), without all products in memory at once.

    The way through Gram matrices (T² per example) would need no product at all, but its sum cancels: a norm that
    comes out too small is an example that is clipped too little.
    """
    if left.shape[1] == 1:
        # In float32 the squares of one factor may vanish that the other one makes up for.
        return (_norms(left.double()) * _norms(right.double())).float()
    return torch.cat([_norms(product) for _, product in _products(left, right)])
