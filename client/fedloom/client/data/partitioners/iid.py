"""Equal shares at random."""

import numpy as np

from fedloom.client.data.rows import Indices, Rows
from fedloom.core.config.parsing import Section

__all__ = ["IID"]


class IID(Section):
    """Equal shares at random."""

    def split(self, rows: Rows, clients: int, draw: np.random.Generator) -> list[Indices]:
        """Deal shuffled rows out; sizes differ by one at most."""
        return np.array_split(draw.permutation(np.arange(len(rows), dtype=np.int64)), clients)
