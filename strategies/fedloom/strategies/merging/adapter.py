"""A finished adapter as what it adds to its base model: one low-rank product for each layer, and whole tensors.

Factors are never averaged: (B G^-1, G A) is the same model as (B, A), and sum w_i B_i times sum w_i A_i is not
sum w_i B_i A_i. The product is what a layer gets, so every method of this folder works on products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Array

__all__ = ["FinishedAdapter", "Float64", "Product", "weighted_sum"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """What an adapter adds to one frozen weight, in factors: W = W0 + B A.

    Args:
        b: Shape (out, r), with the LoRA scale s in it.
        a: Shape (r, in).
    """

    b: Float64
    a: Float64

    @property
    def rank(self) -> int:
        """Number of directions that the factors can hold."""
        return len(self.a)

    @property
    def norm(self) -> float:
        """Frobenius norm of B A, from r x r matrices."""
        return float(np.sqrt(max(np.sum((self.b.T @ self.b) * (self.a @ self.a.T)), 0.0)))

    def padded(self, rank: int) -> "Product":
        """The same product with zero directions at its end, `rank` in all."""
        more = rank - self.rank
        return Product(np.pad(self.b, ((0, 0), (0, more))), np.pad(self.a, ((0, more), (0, 0))))

    def dense(self) -> Float64:
        """B A itself, shape (out, in): the memory of the layer's weight."""
        return np.asarray(self.b @ self.a, np.float64)


@dataclass(frozen=True)
class FinishedAdapter:
    """Everything an adapter changes.

    Args:
        products: By the name of the layer.
        whole: Tensors that take the place of the base model's, such as a head or biases, by name.
    """

    products: Mapping[str, Product]
    whole: Mapping[str, Array]

    @property
    def rank(self) -> int:
        """The largest of any product."""
        return max((each.rank for each in self.products.values()), default=0)


def weighted_sum(products: Sequence[Product], coefficients: Sequence[float]) -> Product:
    """sum_i c_i B_i A_i, exactly: the factors stacked, [c_1 B_1 ... c_n B_n] [A_1; ...; A_n].

    Args:
        products: Of one layer; their ranks may differ.
        coefficients: One for each.

    Returns:
        A product whose rank is the sum of theirs.

    >>> one = Product(np.array([[2.0]]), np.array([[1.0, 0.0]]))
    >>> weighted_sum([one, one], [0.5, -2.0]).dense().tolist()
    [[-3.0, 0.0]]
    """
    b = np.concatenate([c * each.b for c, each in zip(coefficients, products, strict=True)], axis=1)
    return Product(b, np.concatenate([each.a for each in products]))
