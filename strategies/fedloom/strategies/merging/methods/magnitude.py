"""Which entries of a matrix are kept by their magnitude."""

import numpy as np
import numpy.typing as npt

from fedloom.strategies.merging.adapter import Float64

__all__ = ["between"]


def between(values: Float64, smallest: int, largest: int) -> npt.NDArray[np.bool_]:
    """True for all entries but so many of smallest and so many of largest magnitude; of equal ones any is left out.

    Args:
        values: Any shape.
        smallest: How many to leave out at the lower end.
        largest: How many at the upper end; both together at most the number of entries.

    >>> between(np.array([3.0, -1.0, 0.5, -4.0]), 1, 1).tolist()
    [True, True, False, False]
    """
    size = values.size
    if smallest + largest >= size:
        return np.zeros(values.shape, np.bool_)
    magnitudes = np.abs(values).ravel()
    order = np.argpartition(magnitudes, sorted({smallest, size - largest - 1}))
    kept = np.zeros(size, np.bool_)
    kept[order[smallest : size - largest]] = True
    return kept.reshape(values.shape)
