"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805)."""

from dataclasses import dataclass

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.refactorize import Basis, Refactorize, SingularValues
from fedloom.strategies.transforms.refresh import Refresh
from fedloom.strategies.transforms.server_optimizer import ServerOptimizer
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedSVD"]


@dataclass(frozen=True)
class FedSVD(Composed):
    """Train B (and the head), average exactly, then rewrite every pair by its SVD: B = U S, A = V^T (algorithm 1).

    The rows of A rotate within the span of the first A and never leave it. Under SGD with L2 clipping and isotropic
    noise, also with momentum that starts anew each round, the trained model therefore has the same law as under FFA
    with `orthonormal`, but for the first rounds, whose A is the starting A as it was drawn. Adam, per-coordinate
    compression and momentum kept across rounds see the basis and make it a different method. So does `refresh`.

    Args:
        period: Rewrite after every so many rounds, at least 1; the paper uses 1.
        singular_values: Where they go: "B" (the paper's), or "both" by their roots (its ablation, which does worse).
        refresh: Directions of each pair to replace at every rewriting by random ones, those of the smallest singular
            values; what they held goes into the frozen weights, so that the model stays. Ours; 0 for none.
        server_momentum: FedAvgM's decay in [0, 1) on the coordinator, turned along with every rewriting; 0 for none.
        basis: "kept" rewrites after the first `period` rounds alone, see `Refactorize`. Under local steps that do not
            see the basis the model has the same law, and A is broadcast no more. A run whose optimizer moves linearly
            (`sgd`) chooses it by itself.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: `period` is below 1, a number is out of range, or options exclude each other.
    """

    period: int = 1
    singular_values: SingularValues = "B"
    refresh: int = 0
    server_momentum: float = 0.0
    basis: Basis = "turned"
    train_head: bool = True

    def build(self) -> Strategy:
        """Average B, then rewrite."""
        strategy: Strategy = Average(select(Role.LORA_B, head=self.train_head))
        if self.server_momentum:
            strategy = ServerOptimizer(strategy, "momentum", learning_rate=1.0, beta1=self.server_momentum)
        rewritten = Refactorize(strategy, self.period, self.singular_values, self.basis)
        if self.refresh and self.basis == "kept":
            raise ConfigError('refresh changes the basis; set basis = "turned" or refresh = 0')
        if self.refresh and self.singular_values != "B":
            raise ConfigError('refresh puts orthonormal rows into A; set singular_values = "B" or refresh = 0')
        return Refresh(rewritten, self.refresh) if self.refresh else rewritten
