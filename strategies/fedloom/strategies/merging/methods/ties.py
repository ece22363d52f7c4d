"""TIES: trim, elect a sign for each entry, average what agrees with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.strategies.merging.adapter import Float64, Product
from fedloom.strategies.merging.methods.api import Place, check_density, check_scaling, shares
from fedloom.strategies.merging.methods.magnitude import between

__all__ = ["Ties"]


@dataclass(frozen=True)
class Ties:
    """Keep each product's largest entries, elect each entry's sign, and average those that have it.

    With t_i the trimmed products and p_i the shares of the weights, the sign of an entry is that of sum_i p_i t_i, and
    the entry is scaling times the mean, by p_i, of the t_i that are not zero and have this sign.

    Trimming is by layer: the paper trims over all layers together, which would need every product at once. Memory is
    one layer's dense weight in float64, as often as there are adapters and about six times more.

    Args:
        density: Share of the entries that is kept of each product, above 0 to 1; the paper's k is 20 %.
        scaling: lambda, above 0.

    Source: Yadav et al., NeurIPS 2023, arXiv 2306.01708, algorithm 1.
    """

    density: float = 0.2
    scaling: float = 1.0

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        check_density(self.density)
        check_scaling(self.scaling)

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Float64:
        """The dense matrix.

        Raises:
            ConfigError: A weight is negative, or all are zero.
        """
        parts = shares(weights)
        trimmed = [self._trim(each.dense()) for each in products]
        total = sum((p * t for p, t in zip(parts, trimmed, strict=True)), np.zeros_like(trimmed[0]))
        elected = np.where(total >= 0, 1.0, -1.0)
        summed, counted = np.zeros_like(total), np.zeros_like(total)
        for part, each in zip(parts, trimmed, strict=True):
            agrees = part * (np.sign(each) == elected)
            summed += agrees * each
            counted += agrees
        merged: Float64 = self.scaling * np.divide(summed, counted, out=np.zeros_like(summed), where=counted > 0)
        return merged

    def _trim(self, values: Float64) -> Float64:
        kept = int(self.density * values.size)
        return values * between(values, values.size - kept, 0)
