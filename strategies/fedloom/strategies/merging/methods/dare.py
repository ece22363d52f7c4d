"""DARE: drop entries at random and rescale the rest, then add."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.adapter import Float64, Product
from fedloom.strategies.merging.methods.api import Place, check_density, check_scaling
from fedloom.strategies.merging.methods.task_arithmetic import SUM_SCALING

__all__ = ["Dare"]


@dataclass(frozen=True)
class Dare:
    """Drop each entry with probability 1 - density, divide the rest by density, and add: scaling sum_i w_i tau_i / d.

    The expected value is that of task arithmetic. The same seed drops the same entries. What is dropped by chance has
    no low rank: much of such a matrix is lost at the rank of an adapter, and the report says how much.

    Memory is one layer's dense weight in float64, about five times.

    Args:
        density: Share of the entries that is kept, above 0 to 1; the paper drops up to 90 % without loss.
        scaling: Factor of the sum, above 0.
        seed: Which entries are dropped, 0 to 2**63 - 1.

    Source: Yu et al., ICML 2024, arXiv 2311.03099, section 3.2.
    """

    density: float = 0.1
    scaling: float = SUM_SCALING
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        check_density(self.density)
        check_scaling(self.scaling)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; an integer from 0 to 2**63 - 1 is needed")

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Float64:
        """The dense matrix."""
        total = np.zeros((len(products[0].b), products[0].a.shape[1]))
        for index, (each, weight) in enumerate(zip(products, weights, strict=True)):
            kept = self.mask(total.shape, place, index)
            total += self.scaling * weight / self.density * np.where(kept, each.dense(), 0.0)
        return total

    def mask(self, shape: tuple[int, ...], place: Place, adapter: int) -> npt.NDArray[np.bool_]:
        """Which entries of one product are kept.

        Args:
            shape: Of the product.
            place: Where the layer is.
            adapter: Number of the adapter.
        """
        # Every product has a stream of its own; the top word keeps them apart from those that draw a starting adapter.
        stream = np.random.Philox(key=[self.seed, place.index], counter=[0, 0, adapter, 2])
        return np.random.Generator(stream).random(shape) < self.density
