"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629); on LoRA pairs also called FedIT (arXiv 2305.05644)."""

from dataclasses import dataclass

from fedloom.core.schema import Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, trained
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedAvg"]


@dataclass(frozen=True)
class FedAvg(Composed):
    """Train every tensor and average each by itself.

    w <- w + sum_k p_k delta_k with p_k = n_k / sum_j n_j (algorithm 1). Exact for biases and heads. Not exact for
    LoRA pairs: the mean of the products differs from the product of the means by
    sum_k p_k (B_k - B)(A_k - A), and noise on both factors multiplies. FFA and FedSVD avoid both.

    Args:
        train_head: Whether the head is trained; it is broadcast either way.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """Average all there is."""
        return Average(lambda schema: trained(schema, schema.roles - {Role.HEAD}, head=self.train_head))
