"""aTLAS: every adapter counts in every layer as much as was learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.strategies.merging.adapter import Product, weighted_sum
from fedloom.strategies.merging.methods.api import Place

__all__ = ["Atlas"]


@dataclass(frozen=True)
class Atlas:
    """The sum of the products with learned coefficients: theta0 + sum_i Lambda_i tau_i, Lambda_i one scalar a layer.

    The paper's blocks are single parameters of the model; here they are the layers that have a product, which is what
    keeps the rank at the sum of the adapters' ranks.

    Args:
        coefficients: For each layer in the order of `places`, one for each adapter.

    Source: Zhang et al., NeurIPS 2024, arXiv 2407.02880, section 3 (anisotropic scaling).
    """

    coefficients: tuple[tuple[float, ...], ...]

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Product:
        """The sum, in factors."""
        return weighted_sum(products, self.coefficients[place.index])
