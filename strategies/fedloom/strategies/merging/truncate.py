"""A change of a weight at the rank of an adapter, and what is lost by that."""

from dataclasses import dataclass

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.limits import MAX_RANK
from fedloom.strategies.lowrank import RANK_TOLERANCE, refactorize
from fedloom.strategies.merging.adapter import Float64, Product

__all__ = ["Truncated", "truncate"]

_ROUNDING = 1e-14
"""Share of |B| |A| below which a singular value of B A is what float64 leaves of products that cancel."""


@dataclass(frozen=True)
class Truncated:
    """The nearest matrix of a lower rank.

    Args:
        product: With orthonormal rows in A, and in B the singular values, which fall.
        norm: Frobenius norm of what was truncated.
        lost: Frobenius norm of the difference.
    """

    product: Product
    norm: float
    lost: float


def truncate(update: Product | Float64, most: int | None, energy: float) -> Truncated:
    """Keep as few directions as hold a share of the energy, by the SVD.

    The energy of a matrix is the sum of its squared singular values. No matrix of the same rank is nearer
    (Eckart and Young, 1936). Directions below 1e-7 of the largest singular value are rounding and count as nothing, and
    so is what is left where products cancel. A zero matrix keeps one direction.

    Args:
        update: Factors, which are never multiplied out, or a dense matrix (out, in).
        most: Most directions to keep, whatever they hold; None for as many as an adapter can have.
        energy: Share of the energy to hold, above 0 to 1.

    Raises:
        ConfigError: `most` is None and an adapter cannot hold that much.
    """
    if isinstance(update, Product):
        b, a = refactorize(update.b, update.a)
        values = np.linalg.norm(b, axis=0)
        cancelled = _ROUNDING * float(np.linalg.norm(update.b) * np.linalg.norm(update.a))
    else:
        left, values, right = np.linalg.svd(update, full_matrices=False)
        b, a, cancelled = left * values, right, 0.0
    values = np.where(values > max(RANK_TOLERANCE * values[0], cancelled), values, 0.0)
    whole = np.concatenate([[0.0], np.cumsum(values**2)])
    rank = max(1, min(_needed(whole, energy), int(np.count_nonzero(values))))
    if most is None and rank > MAX_RANK:
        raise ConfigError(f"rank {rank} would be needed, and {MAX_RANK} is the most; give a rank or a lower energy")
    rank = min(rank, most or rank)
    if not isinstance(update, Product):
        b, a = refactorize(b[:, :rank], a[:rank])  # for the signs
    lost = float(np.sqrt(np.sum(values[rank:] ** 2)))
    return Truncated(Product(b[:, :rank], a[:rank]), float(np.sqrt(whole[-1])), lost)


def _needed(whole: Float64, energy: float) -> int:
    """How many of the first directions hold this share of the sums' last."""
    return int(np.searchsorted(whole, energy * whole[-1], side="left"))
