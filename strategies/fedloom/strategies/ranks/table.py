"""Which rank a client works at: a table from patterns of client names to ranks, one line for each class of devices."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["check_ranks", "cut", "padded", "rank_of"]


def check_ranks(ranks: Mapping[str, int], schema: Schema | None = None) -> None:
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


def cut(schema: Schema, adapter: Tensors, rank: int) -> dict[str, Array]:
    """The adapter at a lower rank: the first rows of every A and columns of every B, and the rest whole."""
    specs = schema.with_rank(rank).tensors
    return {spec.name: np.ascontiguousarray(adapter[spec.name][tuple(map(slice, spec.shape))]) for spec in specs}


def padded(value: Array, shape: tuple[int, ...]) -> Array:
    """A tensor of a lower rank at the adapter's, with zeros for the rows or columns that it lacks."""
    whole = np.zeros(shape, value.dtype)
    whole[tuple(map(slice, value.shape))] = value
    return whole
