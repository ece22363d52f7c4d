"""What strategies share that train both factors of every pair: the start, the plan, and what is trained."""

from dataclasses import dataclass

from fedloom.core.schema import LORA, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, corrections
from fedloom.strategies.transforms.average import begin, trained

__all__ = ["BothFactors"]


@dataclass(frozen=True)
class BothFactors(Strategy):
    """Both factors of every pair, and the head. A subclass folds and commits.

    Args:
        train_head: Whether the head is trained; it is broadcast either way.
    """

    train_head: bool = True

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: There are no pairs, or the adapter does not fit.
        """
        self.trained(schema)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """Both factors and the head, and the correction of the frozen weights so far."""
        words = state.schema.words(self.trained(state.schema).names())
        return Plan(words, {**state.adapter, **corrections(state)})

    def trained(self, schema: Schema) -> Schema:
        """The tensors that are trained.

        Raises:
            SchemaError: There are no pairs.
        """
        return trained(schema, LORA, head=self.train_head)
