"""FedASK in its private mode (NeurIPS 2025, arXiv 2507.09990)."""

from dataclasses import dataclass

from fedloom.strategies.api import Strategy
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedASK"]


@dataclass(frozen=True)
class FedASK(Composed):
    """Train B over a shared A, and rewrite the mean product as B = U S^(1/2), A = S^(1/2) V^T after every round.

    The paper finds U S V^T of sum_k p_k B_k A_k by a sketch, asking every client twice in a round. In its private mode
    clients train B alone: the coordinator has A and every B_k, the mean product is B A at rank r, and a sketch of
    width r is exact (its theorem on exactness). So no second question is needed, and what is left is FedSVD with the
    roots of the singular values in both factors. Its mode without privacy, which trains both factors, is not here.

    Args:
        train_head: Whether the head is trained; it is broadcast either way.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """FedSVD with the other split."""
        return FedSVD(singular_values="both", train_head=self.train_head)
