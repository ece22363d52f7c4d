"""What a finished adapter's products look like: singular values, and where two adapters point."""

from dataclasses import dataclass

import numpy as np

from fedloom.core.errors import SchemaError
from fedloom.strategies.merging.adapter import Float64, Product
from fedloom.strategies.merging.truncate import truncate

__all__ = ["Likeness", "Spectrum", "likeness", "spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """One product by its singular values.

    Args:
        values: Singular values that are not rounding, falling; none of a zero product.
        rank: What its factors could hold.
    """

    values: tuple[float, ...]
    rank: int

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(np.linalg.norm(self.values))

    @property
    def effective_rank(self) -> float:
        """exp(H(p)) with p_k = sigma_k / sum sigma: from 1 for one direction to `rank` for equal ones; 0 of zero.

        Source: Roy and Vetterli, EUSIPCO 2007, definition 1.
        """
        if not self.values:
            return 0.0
        parts = np.asarray(self.values) / sum(self.values)
        return float(np.exp(-np.sum(parts * np.log(parts))))


@dataclass(frozen=True)
class Likeness:
    """How alike two products of one layer are.

    Args:
        cosine: <P, Q> / (|P| |Q|), -1 to 1: whether they add the same.
        inputs: Overlap of the row spaces, 0 to 1: whether they read the same directions.
        outputs: Overlap of the column spaces, 0 to 1: whether they write the same directions.
    """

    cosine: float
    inputs: float
    outputs: float


def spectrum(product: Product) -> Spectrum:
    """The singular values of a product, from its factors."""
    return Spectrum(tuple(float(each) for each in _directions(product)[1]), product.rank)


def likeness(one: Product, two: Product) -> Likeness:
    """How alike two products are; all is 0 if one of them is zero.

    The overlap of two spaces with orthonormal bases V and W, of r and s <= r directions, is |V W^T|_F^2 / s: the mean
    squared cosine of the angles between them. Two random spaces of r directions in d dimensions have r / d. It is
    phi of Hu et al., ICLR 2022, arXiv 2106.09685, section 7.2 (their equation 4), at full width.

    Raises:
        SchemaError: They are of layers of other shapes.
    """
    if (len(one.b), one.a.shape[1]) != (len(two.b), two.a.shape[1]):
        raise SchemaError(
            f"products of shapes {(len(one.b), one.a.shape[1])} and {(len(two.b), two.a.shape[1])} cannot be compared; "
            "give adapters of the same layers"
        )
    (u, s, v), (w, t, z) = _directions(one), _directions(two)
    if not s.size or not t.size:
        return Likeness(0.0, 0.0, 0.0)
    written, read = u.T @ w, v @ z.T
    least = min(len(s), len(t))
    inner = float(np.sum((s[:, None] * read * t) * written))
    return Likeness(
        inner / float(np.linalg.norm(s) * np.linalg.norm(t)),
        float(np.sum(read**2)) / least,
        float(np.sum(written**2)) / least,
    )


def _directions(product: Product) -> tuple[Float64, Float64, Float64]:
    """U, sigma and V^T of the thin SVD, without what is zero."""
    found = truncate(product, None, 1.0)
    values = np.linalg.norm(found.product.b, axis=0)
    kept = values.size if found.norm else 0
    return found.product.b[:, :kept] / values[:kept], values[:kept], found.product.a[:kept]
