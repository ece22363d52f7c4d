"""What a partitioner is, and how a split is made: every row once, no client without rows."""

from typing import Protocol

import numpy as np

from fedloom.client.data.rows import Indices, Rows
from fedloom.core.errors import ConfigError

__all__ = ["Partitioner", "partition", "without_empty"]

# Second word of the Philox key. Strategies put the round there, and a run has far fewer rounds than this.
_STREAM = 1 << 32


class Partitioner(Protocol):
    """A way to split a data set, of the entry-point group `fedloom.partitioners`; its options are keys of [data]."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """The positions of each client's rows, in any order: every row once, at least one for each client.

        Args:
            rows: The data set.
            clients: Number of clients, 1 to len(rows).
            draw: The only source of randomness; equal states give equal splits.

        Raises:
            ConfigError: These rows cannot be split like this.
        """


def partition(rows: Rows, clients: int, by: Partitioner, seed: int) -> list[Indices]:
    """Share all rows out among clients: disjoint, complete, at least one row for each client.

    Args:
        rows: The data set.
        clients: Number of clients, 1 to len(rows).
        by: How to split.
        seed: 0 to 2**63 - 1; equal seeds give equal partitions.

    Returns:
        One ascending int64 index array for each client.

    Raises:
        ConfigError: There are fewer rows than clients, these rows cannot be split like this, or the partitioner, which
            may be another package's, left out a row or a client.
    """
    if not 1 <= clients <= len(rows):
        raise ConfigError(f"data.clients = {clients} with {len(rows)} rows; 1 to {len(rows)} clients are possible")
    draw = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], np.uint64)))
    parts = [np.sort(np.asarray(part, np.int64)) for part in by.split(rows, clients, draw)]
    what = f"partitioner {type(by).__name__}"
    if len(parts) != clients or not all(len(part) for part in parts):
        raise ConfigError(
            f"{what} gives rows to {sum(len(part) > 0 for part in parts)} of {clients} clients; each needs at least one"
        )
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(rows))):
        raise ConfigError(f"{what} does not give each of {len(rows)} rows to exactly one client; correct its split")
    return parts


def without_empty(parts: list[Indices]) -> list[Indices]:
    """Give each client without rows one row of the client that has most."""
    for client, part in enumerate(parts):
        if not len(part):
            donor = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[client], parts[donor] = parts[donor][-1:], parts[donor][:-1]
    return parts
