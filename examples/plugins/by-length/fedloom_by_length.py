"""Feature skew by the length of a text: some clients have short ones, others long ones."""

import numpy as np
from pydantic import Field

from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section

__all__ = ["ByLength"]


class ByLength(Section):
    """Sort rows by the length of their text and cut them in equal parts, after moving some elsewhere at random."""

    mixed: float = Field(default=0.2, ge=0, le=1)
    """Share of the rows that go to a client at random; 0 is fully sorted, 1 is as iid."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Sort, then shuffle a share of the places among themselves."""
        shuffled = draw.permutation(len(rows))  # equal lengths in random order
        order = shuffled[np.argsort([len(rows.texts[i]) for i in shuffled], kind="stable")]
        places = np.flatnonzero(draw.random(len(rows)) < self.mixed)
        order[places] = order[draw.permutation(places)]
        return np.array_split(order, clients)
