"""FLoRIST (Ramesh and Dass, MLSys 2026, arXiv 2506.09199)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Pair
from fedloom.strategies.api import Traits
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.stacking.stack import Kept, Stack, stack

__all__ = ["FLoRIST"]


@dataclass(frozen=True)
class FLoRIST(FLoRA):
    """FLoRA, less the small singular values of each module's stack.

    The SVD of the stack comes from the thin factors (section 3 of the paper; here QR and an SVD of the small core). Of
    its singular values the first p are kept with sum_{i <= p} sigma_i^2 >= energy * sum_i sigma_i^2, p by module. What
    is lost is at most sqrt(1 - energy) of the stack's norm, and the correction that clients receive grows by p a round
    instead of by the sum of their ranks. In a private run it cuts off directions that hold little but noise.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        energy: Share of the stack's squared norm that is kept, in (0, 1]; 1 is FLoRA.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1, or the energy out of range.
    """

    traits: ClassVar[Traits] = Traits(keeps_updates=True, rewrites=True, lossy=True)
    energy: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise ConfigError(f"strategy.options.energy is {self.energy!r}; set a share above 0 and up to 1")

    def merged(self, kept: Kept, pair: Pair) -> Stack:
        """The stack, cut."""
        b, a = refactorize(*stack(kept, pair))
        squares = np.square(b).sum(0)  # the columns of B' are as long as the singular values, in falling order
        enough = np.cumsum(squares) >= self.energy * squares.sum() * (1 - 1e-12)
        rank = int(np.argmax(enough)) + 1
        return b[:, :rank], a[:rank]
