"""FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629); on LoRA pairs also called FedIT (arXiv 2305.05644)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedloom.core.schema import Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, trained

__all__ = ["FedAvg"]

_AVERAGED = frozenset({Role.LORA_A, Role.LORA_B, Role.BIAS})


@dataclass(frozen=True)
class FedAvg:
    """Train every tensor and average each by itself.

    w <- w + sum_k p_k delta_k with p_k = n_k / sum_j n_j (algorithm 1). Exact for biases and heads. Not exact for
    LoRA pairs: the mean of the products differs from the product of the means by
    sum_k p_k (B_k - B)(A_k - A), and noise on both factors multiplies. FFA and FedSVD avoid both.

    Args:
        train_head: Whether the head is trained; it is broadcast either way.
    """

    linear: ClassVar[bool] = True
    train_head: bool = True

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: Nothing would be trained, or the adapter does not fit.
        """
        self._trained(schema)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """Every role but a frozen head, the same for all clients and rounds."""
        return Plan(train=self._trained(state.schema).roles, broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update, see `mean.fold`."""
        return fold(self._trained(state.schema), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move the adapter by the mean change."""
        return replace(state, adapter=apply_mean_delta(state.adapter, acc), round=state.round + 1)

    def _trained(self, schema: Schema) -> Schema:
        return trained(schema, schema.roles & _AVERAGED, head=self.train_head)
