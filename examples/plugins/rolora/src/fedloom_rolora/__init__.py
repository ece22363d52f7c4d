"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755) as a package of its own."""

from dataclasses import dataclass, replace

from fedloom.core.schema import LORA, Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, trained

__all__ = ["RoLoRA"]


@dataclass(frozen=True)
class RoLoRA:
    """Train B in one round and A in the next; whichever rests is shared, so every average is exact.

    sum_k p_k B_k A = (sum_k p_k B_k) A while A rests, and the mirror image while B rests (section 3 of the paper).
    Clients upload half of a pair, noise enters linearly, and unlike FFA the row space of A is learned. The first
    round trains B: while B is zero the gradient on A is zero as well.

    Args:
        train_head: Whether the head is trained, in every round; it is broadcast either way.
    """

    train_head: bool = True

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: The schema lacks lora_A or lora_B, or the adapter does not fit.
        """
        trained(schema, LORA, head=self.train_head)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The factor whose turn it is, and the head."""
        return Plan(train=self._trained(state).roles, broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update of that factor."""
        return fold(self._trained(state), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move it by the mean change; the next round is the other factor's."""
        return replace(state, adapter=apply_mean_delta(state.adapter, acc), round=state.round + 1)

    def _trained(self, state: State) -> Schema:
        # Commits decide whose turn it is, so that a round nobody answered does not skip a factor.
        turn = Role.LORA_A if state.round % 2 else Role.LORA_B
        return trained(state.schema, {turn}, head=self.train_head)
