"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805)."""

from dataclasses import dataclass

from fedloom.core.schema import Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.refactorize import Refactorize
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedSVD"]


@dataclass(frozen=True)
class FedSVD(Composed):
    """Train B (and the head), average exactly, then rewrite every pair by its SVD: B = U S, A = V^T (algorithm 1).

    The rows of A rotate within the span of the first A and never leave it. Under SGD with L2 clipping and isotropic
    noise, also with momentum that starts anew each round, the trained model therefore has the same law as under FFA
    with `orthonormal`, but for the first rounds, whose A is the starting A as it was drawn. Adam, per-coordinate
    compression and momentum kept across rounds see the basis and make it a different method.

    Args:
        period: Rewrite after every so many rounds, at least 1; the paper uses 1.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: `period` is below 1.
    """

    period: int = 1
    train_head: bool = True

    def build(self) -> Strategy:
        """Average B, then rewrite."""
        return Refactorize(Average(select(Role.LORA_B, head=self.train_head)), self.period)
