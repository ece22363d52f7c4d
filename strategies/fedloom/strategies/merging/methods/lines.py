"""LiNeS: shallow layers keep more of the base model than deep ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.adapter import Product, weighted_sum
from fedloom.strategies.merging.methods.api import Place

__all__ = ["LiNeS"]


@dataclass(frozen=True)
class LiNeS:
    """The sum of the products, scaled by (1 / n + slope depth): depth is 0 in the first block and 1 in the last.

    That is lambda(l) = alpha + beta l / (L - 1) of n task vectors whose sum is merged, where the paper's
    alpha = |sum tau_i| / (n |tau_merged|) is 1 / n. What lies outside of the blocks is scaled by 1 / n. Slope 0 with
    equal weights is the soup.

    Args:
        slope: beta, 0 or more; the paper chooses it on held-out rows, so there is no default.

    Source: Wang et al., ICLR 2025, arXiv 2410.17146, section 4.
    """

    slope: float

    def __post_init__(self) -> None:
        """Refuse a slope that favours shallow layers."""
        if not 0 <= self.slope < math.inf:
            raise ConfigError(f"slope is {self.slope:g}; a number from 0 up is needed")

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Product:
        """The scaled sum, in factors."""
        factor = 1 / len(products) + self.slope * place.depth
        return weighted_sum(products, [factor * each for each in weights])
