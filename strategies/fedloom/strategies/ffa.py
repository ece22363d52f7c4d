"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313)."""

from dataclasses import dataclass

from fedloom.core.schema import Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.refactorize import OrthonormalStart
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FFA"]


@dataclass(frozen=True)
class FFA(Composed):
    """Freeze A as it was drawn and train B (and the head): the average is exact and noise enters linearly.

    With A shared, sum_k p_k B_k A = (sum_k p_k B_k) A. Clients upload half of a pair. They receive both factors
    in every round, although A never changes, so that one that joins late needs nothing else.

    Args:
        orthonormal: Replace the starting A by an orthonormal basis of its row space, and B so that their product
            stays. Under plain SGD with L2 clipping and isotropic noise FedSVD then follows the same law; with PEFT's
            draw the gradients on B are about sqrt(3) larger than without, so learning rates do not carry over.
        train_head: Whether the head is trained; it is broadcast either way.
    """

    orthonormal: bool = False
    train_head: bool = True

    def build(self) -> Strategy:
        """Average B over an A that rests."""
        averaged = Average(select(Role.LORA_B, head=self.train_head))
        return OrthonormalStart(averaged) if self.orthonormal else averaged
