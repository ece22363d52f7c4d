"""A robust rule in the place of the mean, around any linear strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.core.registry import build
from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.transforms.average import check, uploaded
from fedloom.strategies.transforms.transform import Transform

__all__ = ["Robust", "Rule", "named"]

_ANYONE = ""
"""The client whose plan everybody gets: the inner strategy is linear, so its plan does not depend on it."""


@dataclass(frozen=True)
class Rule:
    """How many updates become one."""

    name: str
    combine: Callable[[Schema, Sequence[Update], int], Tensors]
    """The change that stands for all of them, from the adapter's schema, the updates and how many may be false."""
    per_faulty: int
    plus: int
    """It needs at least `per_faulty` times the number of false updates plus `plus` updates."""
    by_coordinate: bool
    """Whether it looks at coordinates one by one, which says nothing where both factors of a pair move."""


@dataclass(frozen=True)
class Robust(Transform):
    """Let a rule choose or blend one update out of all, and another strategy commit it as if it were the mean.

    Every update counts once and weights are ignored, because a weight is the client's word. Memory is O(clients): the
    updates of a round are kept, one float32 copy each, until it is committed.

    Args:
        inner: A linear strategy: it plans, and commits the one update.
        rule: Krum, say.
        num_byzantine: False updates the rule is to bear, at least 1.

    Raises:
        ConfigError: The inner strategy is not linear, or `num_byzantine` is below 1.
    """

    inner: Strategy
    rule: Rule
    num_byzantine: int = 1

    def __post_init__(self) -> None:
        """Refuse what the rule means nothing for."""
        if not self.inner.traits.linear:
            raise ConfigError(
                f"strategy {type(self.inner).__name__} does not declare the trait linear; {self.rule.name} hands it "
                "one update in place of the mean, so choose ffa, fedsvd, fedavg or fedpeft as the inner strategy"
            )
        if self.num_byzantine < 1:
            raise ConfigError(
                f"{self.rule.name} against {self.num_byzantine} false updates; set num_byzantine to 1 or more, or use "
                "the inner strategy by itself"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, but that every update is kept, counts once, and some are needed."""
        least = self.rule.per_faulty * self.num_byzantine + self.rule.plus
        return replace(self.inner.traits, linear=False, keeps_updates=True, unweighted=True, least_updates=least)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state.

        Raises:
            SchemaError: See the inner strategy.
            ConfigError: See `plan`.
        """
        state = self.inner.init(schema, adapter, seed)
        self.plan(state, state.round, _ANYONE)
        return state

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, the same for all clients.

        Raises:
            ConfigError: It moves both factors of pairs, and the rule looks at coordinates.
        """
        plan = self.inner.plan(state, round, _ANYONE)
        uploaded = state.schema.select(plan.train, but=plan.personal)
        if self.rule.by_coordinate and uploaded.pairs:
            raise ConfigError(
                f"{self.rule.name} looks at coordinates one by one, but {type(self.inner).__name__} trains both "
                "factors of a pair, whose coordinates mean nothing: (B G^-1, G A) is the same model. Choose an inner "
                "strategy that trains one, such as ffa or fedsvd, or krum, which compares products"
            )
        return plan

    def fold(self, state: State, acc: list[Update] | None, update: Update) -> list[Update]:
        """One more update kept; the list given is used up.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable, see `mean.check`.
        """
        check(uploaded(state.schema, self.plan(state, state.round, _ANYONE)), update)
        kept = [] if acc is None else acc
        kept.append(update)
        return kept

    def commit(self, state: State, acc: list[Update] | None) -> State:
        """Let the inner strategy commit what the rule makes of the updates.

        Raises:
            ProtocolError: There are fewer updates than the rule needs.
        """
        updates, least = acc or [], self.traits.least_updates
        if len(updates) < least:
            raise ProtocolError(
                f"{self.rule.name} against {self.num_byzantine} false updates needs {least} updates and "
                f"got {len(updates)}; raise rounds.min_clients or lower num_byzantine"
            )
        change = self.rule.combine(state.schema, updates, self.num_byzantine)
        delta = {name: tensor.astype(np.float32) for name, tensor in change.items()}
        one = Update(self.rule.name, 1.0, updates[0].start, delta)
        return self.inner.commit(state, self.inner.fold(state, None, one))


def named(rule: Rule, num_byzantine: int, inner: str, train_head: bool) -> Robust:
    """The rule around a registered strategy with its default options.

    Raises:
        ConfigError: There is no such strategy, or see `Robust`.
    """
    return Robust(build("strategies", inner, {"train_head": train_head}), rule, num_byzantine)
