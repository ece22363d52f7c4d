"""The sum of low-rank products by its factors: sum_k p_k B_k A_k = [p_1 B_1, p_2 B_2, ..] [A_1; A_2; ..].

The stack holds the sum exactly, at the sum of the ranks, and no product is formed. Whoever stacks keeps the factors of
every client until the commit: memory is O(clients).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ProtocolError
from fedloom.core.schema import LORA, Array, Pair, Schema
from fedloom.strategies.api import State, Update, corrections
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, check, fold

__all__ = ["Float64", "Kept", "Stack", "corrected", "keep", "shares", "stack", "unpaired"]

Float64 = npt.NDArray[np.float64]
Stack = tuple[Float64, Float64]
"""B of shape (out, R) and A of shape (R, in), whose product is meant."""


@dataclass(frozen=True)
class Kept:
    """Every update of a round."""

    updates: tuple[Update, ...]
    unpaired: Sum
    """The weighted sum of the changes outside pairs, and the sum of the weights."""


def keep(schema: Schema, acc: Kept | None, update: Update) -> Kept:
    """What is kept after one more update; `schema` is that of the uploaded tensors, at the client's rank.

    Raises:
        SchemaError: A tensor is missing, unexpected or of another shape.
        UpdateRejected: The change or the weight is not usable.
    """
    check(schema, update)
    rest = schema.select(schema.roles - LORA)
    total = fold(
        rest, acc.unpaired if acc else None, replace(update, delta={s.name: update.delta[s.name] for s in rest.tensors})
    )
    return Kept((*(acc.updates if acc else ()), update), total)


def shares(kept: Kept) -> list[float]:
    """p_k: each update's part of the sum of the weights, in their order."""
    return [update.weight / kept.unpaired.weight for update in kept.updates]


def unpaired(state: State, kept: Kept | None) -> tuple[dict[str, Array], Kept]:
    """The adapter with everything outside pairs moved by its mean change, and what was kept.

    Raises:
        ProtocolError: No update was folded.
    """
    if kept is None:
        raise ProtocolError("a round without updates cannot be committed; wait for at least one client")
    return apply_mean_delta(state.adapter, kept.unpaired), kept


def stack(kept: Kept, pair: Pair, columns: Callable[[Update, float], float | Array] | None = None) -> Stack:
    """The factors of sum_k p_k B_k A_k for one pair, float64.

    Args:
        kept: The updates, of any ranks.
        pair: Which pair.
        columns: From an update and its p_k to what each column of its B counts, a number or shape (r_k,); None: p_k.
    """
    counts = [columns(u, p) if columns else p for u, p in zip(kept.updates, shares(kept), strict=True)]
    bs = [update.value(pair.b) * count for update, count in zip(kept.updates, counts, strict=True)]
    return np.concatenate(bs, axis=1), np.concatenate([update.value(pair.a) for update in kept.updates])


def corrected(state: State, more: Mapping[str, Stack]) -> dict[str, Array]:
    """The memory of a state with more of a correction to the frozen weights, at the least rank that loses nothing.

    Args:
        state: Whose memory may hold a correction.
        more: By module of every pair, the factors of what is added to its W0.

    Returns:
        The memory, in which MODULE.base_A and MODULE.base_B hold the sum of both, float32. All modules have one
        rank, the largest that one of them needs, which is at most its smaller side.
    """
    old = corrections(state)
    exact: dict[str, Stack] = {}
    for module, (b, a) in more.items():
        if f"{module}.base_A" in old:
            b = np.concatenate([old[f"{module}.base_B"].astype(np.float64), b], axis=1)
            a = np.concatenate([old[f"{module}.base_A"].astype(np.float64), a])
        exact[module] = refactorize(b, a)
    rank = max(min(b.shape[0], *a.shape) for b, a in exact.values())
    memory: dict[str, Array] = dict(state.memory)
    for module, (b, a) in exact.items():
        kept = min(rank, len(a))
        memory[f"{module}.base_A"] = np.zeros((rank, a.shape[1]), np.float32)
        memory[f"{module}.base_B"] = np.zeros((b.shape[0], rank), np.float32)
        memory[f"{module}.base_A"][:kept] = a[:kept]
        memory[f"{module}.base_B"][:, :kept] = b[:, :kept]
    return memory
