"""Uniform and weighted soups: the mean of the models."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.strategies.merging.adapter import Product, weighted_sum
from fedloom.strategies.merging.methods.api import Place, shares

__all__ = ["Soup"]


@dataclass(frozen=True)
class Soup:
    """The weighted mean of the products: theta0 + sum_i p_i tau_i with p_i = w_i / sum w.

    Equal weights are the uniform soup. The mean of models is exact here, at a rank of at most the sum of theirs.

    Source: Wortsman et al., ICML 2022, arXiv 2203.05482, "uniform soup".
    """

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Product:
        """The mean, in factors.

        Raises:
            ConfigError: A weight is negative, or all are zero.
        """
        return weighted_sum(products, shares(weights))
