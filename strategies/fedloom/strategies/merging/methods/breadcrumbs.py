"""Model Breadcrumbs: neither outliers nor negligible changes are merged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.adapter import Float64, Product
from fedloom.strategies.merging.methods.api import Place, check_scaling
from fedloom.strategies.merging.methods.magnitude import between
from fedloom.strategies.merging.methods.task_arithmetic import SUM_SCALING

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True)
class Breadcrumbs:
    """Leave out the largest and the smallest entries of each product, layer by layer, and add what is between.

    theta0 + scaling sum_i w_i m_i tau_i, where the mask m_i is 0 for the `smallest` share of the layer's entries by
    magnitude (the paper's beta) and for the `largest` share (its 1 - gamma).

    Memory is one layer's dense weight in float64, about five times.

    Args:
        smallest: Share left out at the lower end, 0 to below 1.
        largest: Share left out at the upper end, 0 to below 1; both together below 1.
        scaling: Factor of the sum, above 0.

    Source: Davari and Belilovsky, ECCV 2024, arXiv 2312.06795, section 3.
    """

    smallest: float = 0.85
    largest: float = 0.01
    scaling: float = SUM_SCALING

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        check_scaling(self.scaling)
        if min(self.smallest, self.largest) < 0 or not self.smallest + self.largest < 1:
            raise ConfigError(
                f"smallest is {self.smallest:g} and largest {self.largest:g}; two shares from 0 up that leave some "
                "entries between them are needed"
            )

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Float64:
        """The dense matrix."""
        total = np.zeros((len(products[0].b), products[0].a.shape[1]))
        low, high = (int(share * total.size) for share in (self.smallest, self.largest))
        for each, weight in zip(products, weights, strict=True):
            values = each.dense()
            total += self.scaling * weight * np.where(between(values, low, high), values, 0.0)
        return total
