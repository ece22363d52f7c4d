"""Label skew (Hsu, Qi & Brown 2019, arXiv:1909.06335)."""

import numpy as np
from pydantic import Field

from fedloom.client.data.partitioners.api import without_empty
from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section

__all__ = ["Dirichlet", "split_by_label"]


class Dirichlet(Section):
    """Label skew: for each label, the clients' shares are drawn from a symmetric Dirichlet distribution.

    It is drawn per label rather than per client as in the paper, so that no row is left over. Where
    rows have no label of their own, shares are of uneven size.
    """

    # At 1e6 a share deviates from an equal one by about a thousandth; far above it the draw overflows.
    dirichlet_alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Concentration of the distribution; small is more skewed."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Split the rows of each label by a draw of its own."""
        return split_by_label(np.arange(len(rows), dtype=np.int64), rows, clients, self.dirichlet_alpha, draw)


def split_by_label(
    indices: Indices, rows: Rows, clients: int, alpha: float, draw: np.random.Generator
) -> list[Indices]:
    """Label skew among `clients` clients over the rows at `indices`."""
    shares: list[list[Indices]] = [[] for _ in range(clients)]
    kinds = rows.kinds[indices]
    for kind in np.unique(kinds):
        members = draw.permutation(indices[kinds == kind])
        proportions = draw.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for share, piece in zip(shares, np.split(members, cuts), strict=True):
            share.append(piece)
    return without_empty([np.concatenate(share) for share in shares])
