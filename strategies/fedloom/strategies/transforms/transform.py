"""A transform is a strategy around a strategy, and a strategy of a paper is a few transforms around one another.

What a transform does to updates comes before the strategy inside sees them; what it does to the state comes after that
strategy's commit. So `NormBound(Robust(Average(...), KRUM), 0.5)` bounds, then compares, then moves the adapter.
"""

from typing import Any, ClassVar

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update

__all__ = ["Composed", "Transform", "named"]


class _Around(Strategy):
    """All of another strategy, but for the methods that a subclass replaces."""

    def _inside(self) -> Strategy:
        raise NotImplementedError

    @property
    def traits(self) -> Traits:
        """That strategy's."""
        return self._inside().traits

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """That strategy's state.

        Raises:
            SchemaError: See that strategy.
        """
        return self._inside().init(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """That strategy's plan."""
        return self._inside().plan(state, round, client)

    def check(self, state: State, update: Update) -> None:
        """Refuse what that strategy refuses.

        Raises:
            SchemaError: See that strategy.
            UpdateRejected: Likewise.
        """
        self._inside().check(state, update)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """What that strategy folds.

        Raises:
            SchemaError: See that strategy.
            UpdateRejected: Likewise.
        """
        return self._inside().fold(state, acc, update)

    def commit(self, state: State, acc: Any) -> State:
        """What that strategy commits.

        Raises:
            ProtocolError: See that strategy.
        """
        return self._inside().commit(state, acc)

    def result(self, state: State) -> Tensors:
        """That strategy's result."""
        return self._inside().result(state)


class Transform(_Around):
    """All of `inner`, but for the methods that a subclass replaces. Subclasses are frozen dataclasses."""

    inner: Strategy
    implied: ClassVar[bool] = False
    """Whether it comes without being asked for, so that messages name what is inside."""

    def _inside(self) -> Strategy:
        return self.inner


class Composed(_Around):
    """A strategy put together from transforms: make a frozen dataclass of it, with options as fields, and `build`.

    `build` is called once, when an instance is made, so that bad options are refused there.
    """

    _built: Strategy

    def __post_init__(self) -> None:
        """Put it together."""
        object.__setattr__(self, "_built", self.build())

    def build(self) -> Strategy:
        """The strategy that these options stand for.

        Raises:
            ConfigError: An option is out of range, or the transforms do not go together.
        """
        raise NotImplementedError(f"define {type(self).__name__}.build() and return a strategy")

    def _inside(self) -> Strategy:
        return self._built


def named(strategy: Strategy) -> str:
    """Class name of a strategy in messages: of what is inside where the transform is no choice of the run file's."""
    return named(strategy.inner) if isinstance(strategy, Transform) and strategy.implied else type(strategy).__name__
