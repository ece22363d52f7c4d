"""Which rank a client works at: a table from patterns of client names to ranks, one line for each class of devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.strategies.api import Plan, State
from fedloom.strategies.stacking.both_factors import BothFactors

__all__ = ["Ranked", "padded", "rank_of"]


@dataclass(frozen=True)
class Ranked(BothFactors):
    """Both factors, at a rank of the client's own.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse ranks that there are not."""
        _check(self.ranks)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: There are no pairs, or the adapter does not fit.
            ConfigError: A client's rank is above the adapter's.
        """
        state = super().init(schema, adapter, seed)
        _check(self.ranks, schema)
        return state

    def plan(self, state: State, round: int, client: str) -> Plan:
        """As for every client, at this one's rank: the first rows of every A and columns of every B."""
        plan, rank = super().plan(state, round, client), rank_of(self.ranks, client, state.schema.rank)
        if rank == state.schema.rank:
            return plan
        specs = state.schema.with_rank(rank).tensors
        cut = {s.name: np.ascontiguousarray(state.adapter[s.name][tuple(map(slice, s.shape))]) for s in specs}
        return replace(plan, broadcast={**plan.broadcast, **cut}, rank=rank)

    def uploaded(self, schema: Schema, client: str) -> Schema:
        """The tensors that a client sends back, at its rank; `schema` is that of the global adapter."""
        return self.trained(schema).with_rank(rank_of(self.ranks, client, schema.rank))


def _check(ranks: Mapping[str, int], schema: Schema | None = None) -> None:
    """Refuse a table that asks for a rank that there is not.

    Raises:
        ConfigError: A rank is below 1 or, with a schema, above the adapter's.
    """
    most = schema.rank if schema else None
    for pattern, rank in ranks.items():
        if rank < 1 or (most is not None and rank > most):
            raise ConfigError(
                f"strategy.options.ranks gives clients {pattern!r} rank {rank}; "
                f"{'at least 1' if most is None else f'1 to adapter.rank = {most}'} is allowed"
            )


def rank_of(ranks: Mapping[str, int], client: str, most: int) -> int:
    """The rank of one client: that of the first pattern that fits its name, and the adapter's where none does.

    >>> rank_of({"phone-*": 2, "*-lab": 8}, "phone-7", 16), rank_of({"phone-*": 2}, "clinic", 16)
    (2, 16)
    """
    return next((rank for pattern, rank in ranks.items() if fnmatchcase(client, pattern)), most)


def padded(value: Array, shape: tuple[int, ...]) -> Array:
    """A tensor of a lower rank at the adapter's, with zeros for the rows or columns that it lacks."""
    whole = np.zeros(shape, value.dtype)
    whole[tuple(map(slice, value.shape))] = value
    return whole
