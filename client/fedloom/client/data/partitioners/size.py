"""Unequal shares at random."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ConfigError

__all__ = ["Size"]


class Size(Section):
    """At random, in unequal shares: client k gets rows in proportion to k to the power of minus size_exponent."""

    size_exponent: float = Field(default=1.0, ge=0, le=10)
    """The exponent; 0 is equal."""
    shares: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(), max_length=10_000)
    """One number for each client, to which its rows are in proportion, in place of size_exponent."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Cut shuffled rows where the sizes say.

        Raises:
            ConfigError: There are not as many shares as clients.
        """
        if self.shares and len(self.shares) != clients:
            raise ConfigError(
                f"data.shares has {len(self.shares)} numbers for {clients} clients; give each one above 0"
            )
        given = self.shares or [float(client) ** -self.size_exponent for client in range(1, clients + 1)]
        ends = np.cumsum(_sizes(len(rows), clients, given))[:-1]
        return np.split(draw.permutation(np.arange(len(rows), dtype=np.int64)), ends)


def _sizes(count: int, clients: int, shares: Sequence[float]) -> list[int]:
    """How many of `count` rows each client gets: one, and of the rest its share, by largest remainder."""
    # Divided first by the largest: numbers near the end of their range have no sum.
    given = np.array(shares) / max(shares)
    wanted, low = np.ones(clients), np.zeros(clients, np.bool_)
    while not low.all():
        wanted = np.where(low, 1.0, (count - low.sum()) * given / given[~low].sum())
        if not (wanted < 1).any():
            break
        low |= wanted < 1  # who would get less than a row gets one, and the others share what that leaves
    whole = np.maximum(1, np.floor(wanted)).astype(np.int64)
    for client in np.argsort(whole - wanted, kind="stable")[: count - int(whole.sum())]:
        whole[client] += 1
    return [int(size) for size in whole]
