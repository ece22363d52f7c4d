"""FedAdam, FedYogi, FedAdagrad (Reddi et al., ICLR 2021, arXiv 2003.00295) and FedAvgM (arXiv 1909.06335)."""

from dataclasses import dataclass

from fedloom.core.registry import build
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.server_optimizer import Optimizer, ServerOptimizer
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedOpt"]


@dataclass(frozen=True)
class FedOpt(Composed):
    """Move the adapter by an optimizer's step along the mean change of a round, with moments from round to round.

    The formulas are in `fedloom.strategies.transforms.server_optimizer`. Private runs pay nothing for it: the mean is
    made of noised updates. Adaptive steps divide by the size of the change, and noise is part of that.

    Args:
        optimizer: "adam", "yogi", "adagrad" or "momentum".
        learning_rate: Of the coordinator, positive; the paper's grid for adaptive ones goes from 1e-3 to 1.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1), for adam and yogi.
        tau: What is added to the root of the second moment, positive.
        inner: Name of the linear strategy that plans and averages; with its default options.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A number is out of range, or the inner strategy is not linear or rewrites its coordinates.
    """

    optimizer: Optimizer = "adam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    inner: str = "ffa"
    train_head: bool = True

    def build(self) -> Strategy:
        """The optimizer around the average."""
        averaged = build("strategies", self.inner, {"train_head": self.train_head})
        return ServerOptimizer(averaged, self.optimizer, self.learning_rate, self.beta1, self.beta2, self.tau)
