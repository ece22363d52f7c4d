"""Task arithmetic: task vectors are added, or taken away."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.strategies.merging.adapter import Product, weighted_sum
from fedloom.strategies.merging.methods.api import Place, check_scaling

__all__ = ["SUM_SCALING", "TaskArithmetic"]

SUM_SCALING = 0.4
"""Factor of a sum of task vectors where no held-out rows choose one: Yadav et al., arXiv 2306.01708, take it for task
arithmetic."""


@dataclass(frozen=True)
class TaskArithmetic:
    """The sum of the products: theta0 + scaling sum_i w_i tau_i, with w_i = 1 unless given.

    A negative weight takes away what its adapter has learned. With scaling 1 / n and equal weights it is the soup.

    Args:
        scaling: lambda, above 0. The paper chooses it on held-out rows.

    Source: Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2 (negation and addition).
    """

    scaling: float = SUM_SCALING

    def __post_init__(self) -> None:
        """Refuse a scaling that leaves nothing or points backwards."""
        check_scaling(self.scaling)

    def merge(self, products: Sequence[Product], weights: Sequence[float], place: Place) -> Product:
        """The sum, in factors."""
        return weighted_sum(products, [self.scaling * each for each in weights])
