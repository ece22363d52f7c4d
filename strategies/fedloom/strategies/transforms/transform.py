"""A transform is a strategy around a strategy, and a strategy of a paper is a few transforms around one another.

What a transform does to updates comes before the strategy inside sees them; what it does to the state comes after that
strategy's commit. So `NormBound(Robust(Average(...), KRUM), 0.5)` bounds, then compares, then moves the adapter.
"""

from typing import Any

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update

__all__ = ["Composed", "Transform"]


class Transform(Strategy):
    """The inner strategy, but for the methods that a subclass replaces. Subclasses are frozen dataclasses."""

    inner: Strategy

    @property
    def traits(self) -> Traits:
        """The inner strategy's."""
        return self.inner.traits

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state.

        Raises:
            SchemaError: See the inner strategy.
        """
        return self.inner.init(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan."""
        return self.inner.plan(state, round, client)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """What the inner strategy folds.

        Raises:
            SchemaError: See the inner strategy.
            UpdateRejected: Likewise.
        """
        return self.inner.fold(state, acc, update)

    def commit(self, state: State, acc: Any) -> State:
        """What the inner strategy commits.

        Raises:
            ProtocolError: See the inner strategy.
        """
        return self.inner.commit(state, acc)

    def result(self, state: State) -> Tensors:
        """The inner strategy's result."""
        return self.inner.result(state)


class Composed(Transform):
    """A strategy put together from transforms: make a frozen dataclass of it, with options as fields, and `build`.

    `build` is called once, when an instance is made, so that bad options are refused there.
    """

    def __post_init__(self) -> None:
        """Put it together."""
        object.__setattr__(self, "inner", self.build())

    def build(self) -> Strategy:
        """The strategy that these options stand for.

        Raises:
            ConfigError: An option is out of range, or the transforms do not go together.
        """
        raise NotImplementedError(f"define {type(self).__name__}.build() and return a strategy")
