"""Strategies that take turns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule(Strategy):
    """Let another of several strategies have each round: other tensors, other layers.

    All work on one state. Commits decide whose turn it is, so that a round nobody answered does not skip one.

    Args:
        strategies: At least one; each must accept the adapter.
        turn: From the number of commits so far to an index among them.

    Raises:
        ConfigError: There are none, or one rewrites coordinates in which another keeps moments or remembers clients.
    """

    strategies: tuple[Strategy, ...]
    turn: Callable[[int], int]

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if not self.strategies:
            raise ConfigError("a schedule of no strategies; give it at least one")
        if self.traits.rewrites and self.traits.moments:
            raise ConfigError(
                "a schedule in which one strategy rewrites the coordinates that another keeps moments in; leave out "
                "the server optimizer or the refactorization"
            )
        if self.traits.rewrites and self.traits.remembers_clients:
            raise ConfigError(
                "a schedule in which one strategy rewrites the coordinates that another remembers clients' gradients "
                "in; leave out one of the two"
            )

    @property
    def traits(self) -> Traits:
        """What all of them promise, and what any of them needs."""
        found = [each.traits for each in self.strategies]
        return Traits(
            linear=all(each.linear for each in found),
            rewrites=any(each.rewrites for each in found),
            moments=any(each.moments for each in found),
            linear_moments={each.linear_moments for each in found if each.moments} == {True},
            lossy=any(each.lossy for each in found),
            keeps_updates=any(each.keeps_updates for each in found),
            plain_sgd=any(each.plain_sgd for each in found),
            remembers_clients=any(each.remembers_clients for each in found),
            unweighted=any(each.unweighted for each in found),
            least_updates=max(each.least_updates for each in found),
            reads_noise=any(each.reads_noise for each in found),
        )

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state that all of them begin from, each having set up its part.

        Raises:
            SchemaError: One of them lacks something.
        """
        first, *others = self.strategies
        state = first.init(schema, adapter, seed)
        for each in others:
            more = each.init(schema, state.adapter, seed)
            state = State(schema, more.adapter, seed, memory={**state.memory, **more.memory})
        return state

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The plan of the strategy whose turn it is."""
        return self._now(state).plan(state, round, client)

    def check(self, state: State, update: Update) -> None:
        """Refuse what the strategy whose turn it is refuses.

        Raises:
            SchemaError: See that strategy.
            UpdateRejected: Likewise.
        """
        self._now(state).check(state, update)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        """What the strategy whose turn it is folds.

        Raises:
            SchemaError: See that strategy.
            UpdateRejected: Likewise.
        """
        return self._now(state).fold(state, acc, update)

    def commit(self, state: State, acc: Any) -> State:
        """What the strategy whose turn it is commits.

        Raises:
            ProtocolError: See that strategy.
        """
        return self._now(state).commit(state, acc)

    def _now(self, state: State) -> Strategy:
        return self.strategies[self.turn(state.round)]
