"""The weighted mean of updates, summed one at a time in float64.

For strategies whose next adapter is linear in the updates, w <- w + sum_k p_k delta_k with p_k = n_k / sum_j n_j
(McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1). Memory is one float64 copy of the trained tensors,
however many clients there are.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ProtocolError, SchemaError, UpdateRejected
from fedloom.core.schema import Array, Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update

__all__ = [
    "Average",
    "Select",
    "Sum",
    "add",
    "apply_mean_delta",
    "begin",
    "check",
    "fold",
    "mean",
    "select",
    "trained",
    "uploaded",
]

Select = Callable[[Schema], Schema]
"""From the adapter's schema to that of the tensors that are trained; raises `SchemaError` where there are none."""

# float32 ends at 3.4e38. A change beyond this comes from a diverged or hostile client, and refusing it leaves the
# headroom in which no mean, no sum over rounds and no product with an orthonormal factor can overflow.
_MAX_CHANGE = 1e30
# Wide enough for any count of examples, narrow enough that weight times change stays a normal float64.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-15, 1e15


@dataclass(frozen=True)
class Sum:
    """A running weighted sum."""

    weight: float
    """Sum of the weights so far, positive."""
    total: Mapping[str, npt.NDArray[np.float64]]
    """Sum of weight times change, by tensor name."""


@dataclass(frozen=True)
class Average(Strategy):
    """Train the selected tensors and move each by the weighted mean of its changes; the rest stay as they are.

    Every client gets the whole adapter in every round, so that one that joins late needs nothing else.

    Args:
        select: Which tensors are trained, the same in every round, see `select`.
    """

    traits: ClassVar[Traits] = Traits(linear=True, same_tensors=True)
    select: Select

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: Nothing is selected, or the adapter does not fit.
        """
        self.select(schema)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The selected tensors, the same for all clients and rounds."""
        return Plan(train=state.schema.words(self.select(state.schema).names()), broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update, see the function `fold`."""
        return fold(self.select(state.schema), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move the adapter by the mean change."""
        return replace(state, adapter=apply_mean_delta(state.adapter, acc), round=state.round + 1)


def select(*roles: str, head: bool = True, matching: str = "") -> Select:
    r"""The tensors with one of `roles`, and the head if `head` and there is one.

    Args:
        roles: Roles of tensors, each of which the adapter must have.
        head: Whether the head is among them.
        matching: A regular expression. Of the tensors with one of `roles`, only those are taken in whose name it is
            found: r"layer\.[0-3]\." for the first four layers.

    Returns:
        What gives the tensors of a schema. It raises `SchemaError` where a role is missing, see `trained`, or no name
        matches.
    """

    def chosen(schema: Schema) -> Schema:
        whole = trained(schema, roles, head=head)
        names = schema.select(roles).names()
        left_out = {name for name in names if not re.search(matching, name)}
        if names and left_out == names:
            raise SchemaError(
                f"no tensor matches {matching!r}; the adapter has {', '.join(sorted(names)[:3])} and so on"
            )
        return whole.select(whole.names(), but=left_out)

    return chosen


def begin(schema: Schema, adapter: Tensors, seed: int) -> State:
    """The state before the first round, with nothing remembered.

    Raises:
        SchemaError: The adapter is not exactly the schema's tensors, in finite float32.
    """
    schema.check(adapter)
    for name, tensor in adapter.items():
        if tensor.dtype != np.float32:
            raise SchemaError(f"starting tensor {name!r} is {tensor.dtype}; convert it to float32")
        if not np.isfinite(tensor).all():
            raise SchemaError(f"starting tensor {name!r} holds NaN or Inf; start from finite values")
    return State(schema, adapter, seed)


def trained(schema: Schema, roles: Iterable[str], *, head: bool) -> Schema:
    """The tensors that are trained: those with one of `roles`, and the head if `head` and there is one.

    Raises:
        SchemaError: One of `roles` does not occur in the schema, or nothing would be trained.
    """
    wanted = frozenset(roles)
    have = ", ".join(sorted(schema.roles)) or "nothing"
    missing = wanted - schema.roles
    if missing:
        lacks = ", ".join(sorted(missing))
        raise SchemaError(f"this strategy trains {lacks}, but the adapter has {have}; change adapter.kind or strategy")
    chosen = schema.select(wanted | {Role.HEAD} if head else wanted)
    if not chosen.tensors:
        raise SchemaError(f"nothing to train: the adapter has {have} and the head is frozen; set model.head = 'train'")
    return chosen


def uploaded(schema: Schema, plan: Plan) -> Schema:
    """The tensors that a client which follows `plan` sends back; `schema` is that of the global adapter."""
    at_rank = schema if plan.rank is None else schema.with_rank(plan.rank)
    return at_rank.select(plan.train, but=plan.personal)


def check(schema: Schema, update: Update) -> None:
    """Refuse an update whose change must not be folded; `schema` is that of the trained tensors.

    Raises:
        SchemaError: A tensor is missing, unexpected or of another shape.
        UpdateRejected: The weight is not within [1e-15, 1e15], or a change is NaN, infinite or beyond 1e30.
    """
    if not _MIN_WEIGHT <= update.weight <= _MAX_WEIGHT:
        raise UpdateRejected(
            f"client {update.client!r} sent weight {update.weight!r};"
            f" {_MIN_WEIGHT:g} to {_MAX_WEIGHT:g} is allowed; declare the number of examples or 1"
        )
    schema.check(update.delta)
    for name, delta in update.delta.items():
        # A comparison with NaN is false, so these two also refuse NaN and Inf.
        if not (delta.max() <= _MAX_CHANGE and delta.min() >= -_MAX_CHANGE):
            raise UpdateRejected(
                f"client {update.client!r} sent NaN, Inf or a value beyond {_MAX_CHANGE:g} in {name!r};"
                " lower the learning rate or leave the client out"
            )


def fold(schema: Schema, acc: Sum | None, update: Update) -> Sum:
    """The sum after one more update; the one given is used up.

    Args:
        schema: Schema of the trained tensors, see `trained`.
        acc: The sum so far; None before the first update.
        update: What the client sent.

    Raises:
        SchemaError: A tensor is missing, unexpected or of another shape. The sum given is then as it was.
        UpdateRejected: The change or the weight is not usable, see `check`. Likewise.
    """
    check(schema, update)
    return add(acc, update.weight, update.delta)


def add(acc: Sum | None, weight: float, values: Tensors) -> Sum:
    """The sum after one more set of tensors, which nothing checks; the one given is used up."""
    weighted = ((name, np.multiply(value, weight, dtype=np.float64)) for name, value in values.items())
    if acc is None:
        return Sum(weight, dict(weighted))
    # In place and tensor by tensor: a second set of float64 arrays for every update costs more than the sums.
    for name, more in weighted:
        np.add(acc.total[name], more, out=acc.total[name])
    return Sum(acc.weight + weight, acc.total)


def mean(acc: Sum | None) -> dict[str, npt.NDArray[np.float64]]:
    """The weighted mean change, float64.

    Raises:
        ProtocolError: No update was folded.
    """
    if acc is None:
        raise ProtocolError("a round without updates cannot be committed; wait for at least one client")
    return {name: total / acc.weight for name, total in acc.total.items()}


def apply_mean_delta(adapter: Tensors, acc: Sum | None) -> dict[str, Array]:
    """The adapter plus the mean change, added in float64 and stored in float32.

    Tensors that nobody trained are passed on as they are.

    Raises:
        ProtocolError: No update was folded.
    """
    change = mean(acc)
    return {
        name: (tensor.astype(np.float64) + change[name]).astype(np.float32) if name in change else tensor
        for name, tensor in adapter.items()
    }
