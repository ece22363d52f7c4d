"""Split a data set among simulated clients."""

from typing import Literal

import numpy as np

from fedloom.client.data.rows import Indices, Rows
from fedloom.proto.errors import ConfigError

__all__ = ["Scheme", "partition"]

Scheme = Literal["iid", "dirichlet", "group"]

# Second word of the Philox key. Strategies put the round there, and a run has far fewer rounds than this.
_STREAM = 1 << 32

# At this value a share deviates from an equal one by about a thousandth; far above it the draw overflows.
_MAX_ALPHA = 1e6


def partition(rows: Rows, clients: int, scheme: Scheme, alpha: float, seed: int) -> list[Indices]:
    """Share all rows out among clients: disjoint, complete, at least one row for each client.

    iid: equal shares at random. dirichlet: for each label, the clients' shares are drawn from a symmetric
    Dirichlet distribution (Hsu, Qi & Brown 2019, arXiv:1909.06335, per label rather than per client, so
    that no row is left over). group: each client gets rows of one group only; groups get clients in
    proportion to their size, and each group is shared out as under dirichlet. With fewer clients than
    groups, groups are merged so that the clients' sizes are as even as a greedy choice makes them.

    Args:
        rows: The data set.
        clients: Number of clients, 1 to len(rows).
        scheme: How to split.
        alpha: Concentration of the Dirichlet distribution, above 0 and at most 1e6; not used by iid.
        seed: 0 to 2**63 - 1; equal seeds give equal partitions.

    Returns:
        One ascending int64 index array for each client.

    Raises:
        ConfigError: There are fewer rows than clients, alpha is out of range, or no row has a group.
    """
    if not 1 <= clients <= len(rows):
        raise ConfigError(f"data.clients = {clients} with {len(rows)} rows; 1 to {len(rows)} clients are possible")
    if not 0 < alpha <= _MAX_ALPHA:
        raise ConfigError(f"data.dirichlet_alpha = {alpha}; above 0 and at most {_MAX_ALPHA:g} is allowed")
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], np.uint64)))
    everything = np.arange(len(rows), dtype=np.int64)
    if scheme == "iid":
        parts = np.array_split(generator.permutation(everything), clients)
    elif scheme == "dirichlet":
        parts = _dirichlet(everything, rows, clients, alpha, generator)
    else:
        parts = _by_group(rows, clients, alpha, generator)
    return [np.sort(part) for part in parts]


def _dirichlet(
    indices: Indices, rows: Rows, clients: int, alpha: float, generator: np.random.Generator
) -> list[Indices]:
    """Label skew among `clients` clients over the rows at `indices`."""
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(rows.labels[indices]):
        members = generator.permutation(indices[rows.labels[indices] == label])
        proportions = generator.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, piece in zip(shares, np.split(members, cuts), strict=True):
            share.append(piece)
    return _without_empty([np.concatenate(share) for share in shares])


def _without_empty(parts: list[Indices]) -> list[Indices]:
    """Give each client without rows one row of the client that has most."""
    for client, part in enumerate(parts):
        if not len(part):
            donor = max(range(len(parts)), key=lambda other: len(parts[other]))
            parts[client], parts[donor] = parts[donor][-1:], parts[donor][:-1]
    return parts


def _by_group(rows: Rows, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    names, group_of = np.unique(np.array(rows.groups, dtype=np.str_), return_inverse=True)
    if not any(rows.groups):
        raise ConfigError('data.partition = "group" but no row has a group; add a group column or use "dirichlet"')
    members = [np.flatnonzero(group_of == group) for group in range(len(names))]
    if clients < len(members):
        members = _merged(members, clients)
    counts = _apportioned([len(group) for group in members], clients)
    parts: list[Indices] = []
    for group, count in zip(members, counts, strict=True):
        parts += _dirichlet(group, rows, count, alpha, generator)
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
