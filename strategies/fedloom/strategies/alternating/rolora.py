"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755)."""

from dataclasses import dataclass

from fedloom.core.schema import Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.schedule import Schedule
from fedloom.strategies.transforms.transform import Composed

__all__ = ["RoLoRA"]


@dataclass(frozen=True)
class RoLoRA(Composed):
    """Train B in one round and A in the next; whichever rests is shared, so every average is exact.

    sum_k p_k B_k A = (sum_k p_k B_k) A while A rests, and the mirror image while B rests (section 3 of the paper).
    Clients upload half of a pair, noise enters linearly, and unlike under FFA the row space of A is learned. The first
    round trains B: while B is zero the gradient on A is zero as well.

    Args:
        train_head: Whether the head is trained, in every round; it is broadcast either way.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """B's round, then A's."""
        b, a = (Average(select(role, head=self.train_head)) for role in (Role.LORA_B, Role.LORA_A))
        return Schedule((b, a), turn=lambda commits: commits % 2)
