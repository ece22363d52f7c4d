"""Real silos: a client has rows of one group."""

import numpy as np
from pydantic import Field

from fedloom.client.data.partitioners.dirichlet import split_by_label
from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ConfigError

__all__ = ["Group"]


class Group(Section):
    """Rows of one group of the group column for each client.

    Groups get clients in proportion to their size, and each group is shared out among its clients as under dirichlet.
    With fewer clients than groups, groups are merged so that the clients' sizes are as even as a greedy choice makes
    them.
    """

    dirichlet_alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Concentration of the label skew among the clients of one group; small is more skewed."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Split group by group, or merge groups.

        Raises:
            ConfigError: No row has a group.
        """
        names, group_of = np.unique(np.array(rows.groups, dtype=np.str_), return_inverse=True)
        if not any(rows.groups):
            raise ConfigError('data.partition = "group" but no row has a group; add a group column or use "dirichlet"')
        members = [np.flatnonzero(group_of == group) for group in range(len(names))]
        if clients < len(members):
            members = _merged(members, clients)
        counts = _apportioned([len(group) for group in members], clients)
        parts: list[Indices] = []
        for group, count in zip(members, counts, strict=True):
            parts += split_by_label(group, rows, count, self.dirichlet_alpha, draw)
        return parts


def _merged(members: list[Indices], count: int) -> list[Indices]:
    """Groups joined into `count` bins: the largest first, each into the bin that is smallest so far."""
    bins: list[list[Indices]] = [[] for _ in range(count)]
    for group in sorted(members, key=len, reverse=True):
        min(bins, key=lambda parts: sum(map(len, parts))).append(group)
    return [np.concatenate(parts) for parts in bins]


def _apportioned(sizes: list[int], clients: int) -> list[int]:
    """Clients for each group: one each, then the next to the group with most rows a client (D'Hondt).

    No group gets more clients than rows as long as there are no more clients than rows altogether.
    """
    counts = [1] * len(sizes)
    for _ in range(clients - len(sizes)):
        neediest = max(range(len(sizes)), key=lambda group: sizes[group] / (counts[group] + 1))
        counts[neediest] += 1
    return counts
