"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463)."""

from dataclasses import dataclass
from typing import Literal

from fedloom.core.schema import LORA, Role, Schema
from fedloom.strategies.api import Strategy
from fedloom.strategies.personal.keeping import Keeping
from fedloom.strategies.transforms.average import trained
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedSALoRA"]


@dataclass(frozen=True)
class FedSALoRA(Composed):
    """Train both factors, share one and keep the other: each client ends with an adapter of its own.

    A <- sum_k p_k A_k, and B_k stays with its client (section 4 of the paper, which finds A general and B particular to
    a client's data). Fed-ALoRA (arXiv 2509.25414) finds the opposite and shares B. There is no global model to score:
    a simulation scores every client's own adapter. In a private run what stays is trained on noised gradients as well.

    Args:
        shared: The factor that is averaged: "A" (the paper's) or "B" (Fed-ALoRA's).
        train_head: Whether the head is trained; it is shared.
    """

    shared: Literal["A", "B"] = "A"
    train_head: bool = True

    def build(self) -> Strategy:
        """An average of what is shared."""
        kept = Role.LORA_B if self.shared == "A" else Role.LORA_A
        return Keeping(lambda schema: _without(trained(schema, LORA, head=self.train_head), kept), kept)


def _without(schema: Schema, role: str) -> Schema:
    return schema.select(schema.roles - {role})
