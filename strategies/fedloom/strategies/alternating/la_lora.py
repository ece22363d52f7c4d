"""LA-LoRA (Liu et al., ICLR 2026, arXiv 2602.19926)."""

from dataclasses import dataclass, replace

from fedloom.core.schema import LORA, Role
from fedloom.strategies.api import Plan, State, Strategy
from fedloom.strategies.transforms.average import Average, trained
from fedloom.strategies.transforms.transform import Composed

__all__ = ["LALoRA"]


@dataclass(frozen=True)
class LALoRA(Composed):
    """Let B and A take turns from step to step on the client, and average both.

    Even steps of a round move B, odd ones A, and the head moves in all. What rests is no part of a step's gradient, so
    the clip norm and the noise of a step are for one factor, at the charge of any other step. The first step moves B:
    while B is zero, so is the gradient on A. Averages are not exact: by the end of a round both factors have moved, and
    the noises on both multiply in their product, as under FedAvg.

    The paper also smooths every noised gradient: set `train.smoothing = true`, which the optimizer "sgd" has. Its code
    clips the mean gradient of a batch by a norm taken from the data, which protects no example; here each example's
    gradient is clipped, as in every private run.

    Args:
        train_head: Whether the head is trained, in every step; it is broadcast either way.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """An average of both factors, which take turns."""
        return _InTurns(lambda schema: trained(schema, LORA, head=self.train_head))


@dataclass(frozen=True)
class _InTurns(Average):
    """An average of tensors among which B and A take turns."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        return replace(super().plan(state, round, client), turns=(Role.LORA_B, Role.LORA_A))
