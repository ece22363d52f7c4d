"""Strategies by turns: other roles and other layers in other rounds."""

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import Role, Schema
from fedloom.strategies.api import State, Strategy, Traits
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.buffered import Buffered
from fedloom.strategies.transforms.schedule import Schedule
from fedloom.strategies.transforms.user_level_dp import UserLevel

QUERY, VALUE = "layer.0.query.lora_B", "layer.0.value.lora_B"


def by_layer() -> Schedule:
    """B of the queries in even rounds and of the values in odd ones; the head in all."""
    layers = tuple(Average(select(Role.LORA_B, matching=rf"\.{part}\.")) for part in ("query", "value"))
    return Schedule(layers, turn=lambda commits: commits % 2)


class TestByLayer(StrategyConformance):
    def strategy(self) -> Strategy:
        return by_layer()

    def test_layers_take_turns_and_only_theirs_move(self) -> None:
        strategy, state = self.begin()
        for expected in (QUERY, VALUE, QUERY):
            plan = strategy.plan(state, state.round, "ada")
            updates = self.updates(strategy, state)
            before, state = state, run_round(strategy, state, updates)

            assert plan.train == {expected, Role.HEAD}
            assert updates[0].delta.keys() == {expected, "classifier.weight", "classifier.bias"}
            moved = {n for n, t in state.adapter.items() if not np.array_equal(t, before.adapter[n])}
            assert moved == updates[0].delta.keys()


class TestTwoStrategiesWithMemory(StrategyConformance):
    """Half of the rounds are an orthonormal FFA's and half are FedSVD's: `init` of both has its say."""

    def strategy(self) -> Strategy:
        return Schedule((FFA(orthonormal=True), FedSVD(train_head=False)), turn=lambda commits: min(commits, 1))


def test_a_selection_that_matches_nothing_says_what_there_is() -> None:
    schema = TestByLayer().schema()
    with pytest.raises(SchemaError, match=r"no tensor matches 'layer\.7'; the adapter has layer\.0\.query\.lora_B, "):
        Average(select(Role.LORA_B, matching=r"layer.7")).init(schema, starting_adapter(schema, 0), 0)


def test_every_part_must_accept_the_adapter() -> None:
    schema = TestByLayer().schema().select({Role.HEAD})
    strategy = Schedule((FedAvg(), FFA()), turn=lambda commits: 0)
    with pytest.raises(SchemaError, match="trains lora_B, but the adapter has head"):
        strategy.init(schema, starting_adapter(schema, 0), 0)


def test_it_promises_what_all_do_and_needs_what_any_does() -> None:
    assert by_layer().traits == Traits(linear=True)
    mixed = Schedule((krum(num_byzantine=2), FedSVD()), turn=lambda commits: 0)
    assert mixed.traits == Traits(rewrites=True, keeps_updates=True, unweighted=True, least_updates=7)


def test_what_rounds_have_to_share_is_refused() -> None:
    """An old update is of other tensors, and tree noise could not be taken out of them."""
    with pytest.raises(ConfigError, match="a schedule of no strategies"):
        Schedule((), turn=lambda commits: 0)
    with pytest.raises(ConfigError, match="Schedule cannot use changes made from an older state"):
        Buffered(by_layer())
    with pytest.raises(ConfigError, match="does not train the same tensors in every round, so that tree noise"):
        UserLevel(by_layer(), bytes(32), 3, 1.0, 1.0, "tree")


def test_user_level_noise_is_added_to_what_the_round_trains() -> None:
    strategy = UserLevel(by_layer(), bytes(32), 3, 1.0, 1.0)
    schema: Schema = TestByLayer().schema()
    state: State = strategy.init(schema, starting_adapter(schema, 0), 0)
    for expected in (QUERY, VALUE):
        plan = strategy.plan(state, state.round, "")
        zero = {name: np.zeros(state.adapter[name].shape, np.float32) for name in schema.names(*plan.train)}
        update = TestByLayer().respond(schema, plan, "ada", 0)
        before = state
        acc = strategy.fold(state, None, type(update)("ada", 1.0, plan.broadcast, zero))
        state = strategy.commit(state, acc)

        moved = {n for n, t in state.adapter.items() if not np.array_equal(t, before.adapter[n])}
        assert moved == {expected, "classifier.weight", "classifier.bias"}
