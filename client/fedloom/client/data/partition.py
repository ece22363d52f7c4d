"""Split a data set among simulated clients."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedloom.client.data.rows import Indices, Rows
from fedloom.core.errors import ConfigError

__all__ = ["Scheme", "partition"]

Scheme = Literal["iid", "dirichlet", "group", "pathological", "size"]

# Second word of the Philox key. Strategies put the round there, and a run has far fewer rounds than this.
_STREAM = 1 << 32

# At this value a share deviates from an equal one by about a thousandth; far above it the draw overflows.
_MAX_ALPHA = 1e6

_MAX_EXPONENT = 10.0


def partition(
    rows: Rows,
    clients: int,
    scheme: Scheme,
    alpha: float,
    seed: int,
    *,
    classes: int = 2,
    shares: Sequence[float] = (),
    exponent: float = 1.0,
) -> list[Indices]:
    """Share all rows out among clients: disjoint, complete, at least one row for each client.

    iid: equal shares at random. dirichlet: for each label, the clients' shares are drawn from a symmetric
    Dirichlet distribution (Hsu, Qi & Brown 2019, arXiv:1909.06335, per label rather than per client, so
    that no row is left over). group: each client gets rows of one group only; groups get clients in
    proportion to their size, and each group is shared out as under dirichlet. With fewer clients than
    groups, groups are merged so that the clients' sizes are as even as a greedy choice makes them.
    pathological: each client gets rows of few labels only (McMahan et al. 2017, arXiv:1602.05629, by whole
    labels rather than by shards, which straddle them); each label is shared out evenly among those that have it.
    size: at random, in unequal shares.

    Args:
        rows: The data set.
        clients: Number of clients, 1 to len(rows).
        scheme: How to split.
        alpha: Concentration of the Dirichlet distribution, above 0 and at most 1e6; for dirichlet and group.
        seed: 0 to 2**63 - 1; equal seeds give equal partitions.
        classes: Labels of each client, for pathological; together the clients must be able to hold all labels.
        shares: For size, one number above 0 for each client, to which its rows are in proportion; none makes client
            k's share k ** -exponent.
        exponent: For size without shares, 0 to 10; 0 gives equal shares.

    Returns:
        One ascending int64 index array for each client.

    Raises:
        ConfigError: There are fewer rows than clients, a number is out of range, or no row has the group or label
            that the scheme goes by.
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
    elif scheme == "pathological":
        parts = _pathological(rows, clients, classes, generator)
    elif scheme == "size":
        sizes = _sizes(len(rows), clients, shares, exponent)
        parts = np.split(generator.permutation(everything), np.cumsum(sizes)[:-1])
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


def _pathological(rows: Rows, clients: int, classes: int, generator: np.random.Generator) -> list[Indices]:
    """Rows of `classes` labels for each client.

    The labels in a random order are dealt out one after the other, again from the first when they are used up, so
    that no client gets one twice and no label has many more owners than another.
    """
    if rows.task not in ("text-classification", "image-classification"):
        raise ConfigError(f'data.partition = "pathological" goes by the label of a row, and {rows.task} has none')
    labels = np.unique(rows.labels)
    if not 1 <= classes <= len(labels):
        raise ConfigError(f"data.classes_per_client = {classes}; the data have {len(labels)} labels, so 1 to that many")
    if clients * classes < len(labels):
        raise ConfigError(
            f"{clients} clients with data.classes_per_client = {classes} cannot hold {len(labels)} labels; raise one"
        )
    order = generator.permutation(labels)
    owners: dict[int, list[int]] = {int(label): [] for label in labels}
    for place in range(clients * classes):
        owners[int(order[place % len(order)])].append(place // classes)
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    for label, mine in owners.items():
        members = generator.permutation(np.flatnonzero(rows.labels == label))
        for client, piece in zip(mine, np.array_split(members, len(mine)), strict=True):
            shares[client].append(piece)
    return _without_empty([np.concatenate(share) for share in shares])


def _sizes(count: int, clients: int, shares: Sequence[float], exponent: float) -> list[int]:
    """How many of `count` rows each client gets: one, and of the rest its share, by largest remainder."""
    if shares and (len(shares) != clients or not all(0 < share < float("inf") for share in shares)):
        raise ConfigError(f"data.shares has {len(shares)} numbers for {clients} clients; give each one above 0")
    if not 0 <= exponent <= _MAX_EXPONENT:
        raise ConfigError(f"data.size_exponent = {exponent}; 0 to {_MAX_EXPONENT:g} is allowed")
    given = np.array(shares or [float(client) ** -exponent for client in range(1, clients + 1)])
    # Divided first by the largest: numbers near the end of their range have no sum.
    given = given / given.max()
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
