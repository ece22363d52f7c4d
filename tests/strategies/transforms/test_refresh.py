"""Random directions in place of the weakest: the model stays, the basis is orthonormal, and the span moves."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Strategy
from fedloom.strategies.conformance import StrategyConformance, effective, run_round
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.refactorize import Refactorize
from fedloom.strategies.transforms.refresh import Refresh


class TestEveryRound(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedSVD(refresh=1)


class TestWithMomentum(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedSVD(refresh=2, period=2, server_momentum=0.9)


def test_the_model_is_fedsvds_and_the_weakest_directions_are_new() -> None:
    battery = TestEveryRound()
    strategy, state = battery.begin()
    for round in range(3):
        updates = battery.updates(strategy, state)
        plain = run_round(FedSVD(), state, updates)  # the same state, rewritten and not refreshed

        state = run_round(strategy, state, updates)

        before = {name: each for name, each in updates[0].start.items() if ".base_" in name}
        expected = effective(state.schema, {**plain.adapter, **before})
        found = effective(state.schema, strategy.result(state))
        for pair in state.schema.pairs:
            a = state.adapter[pair.a].astype(np.float64)
            np.testing.assert_allclose(found[pair.module], expected[pair.module], atol=1e-5)
            np.testing.assert_allclose(a[:-1], plain.adapter[pair.a][:-1], atol=1e-6)
            assert not state.adapter[pair.b][:, -1].any()
            # Orthonormal, and the new row orthogonal to the row that left (5 and 7 columns have room for 4 rows).
            np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)
            assert abs(a[-1] @ plain.adapter[pair.a][-1]) < 1e-6
            assert state.memory[f"{pair.module}.base_A"].shape[0] == round + 1


def test_a_width_without_room_keeps_rows_orthonormal() -> None:
    """Two of three rows are new in every round, on 4 inputs: too few to avoid the rows that left."""
    battery, strategy = TestEveryRound(), FedSVD(refresh=2)
    pairs = (("m.lora_A", Role.LORA_A, (3, 4)), ("m.lora_B", Role.LORA_B, (6, 3)))
    schema = Schema(tuple(TensorSpec(name, "m", role, shape) for name, role, shape in pairs))
    state = strategy.init(schema, starting_adapter(schema, 1), 1)
    for _ in range(4):
        state = run_round(strategy, state, battery.updates(strategy, state))

        a = state.adapter["m.lora_A"].astype(np.float64)
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)


def test_what_is_drawn_follows_from_seed_and_round() -> None:
    battery = TestEveryRound()
    strategy, state = battery.begin()
    updates = battery.updates(strategy, state)
    one, two = (run_round(strategy, state, updates) for _ in range(2))
    next_one = run_round(strategy, one, battery.updates(strategy, one))
    pair = state.schema.pairs[1]

    np.testing.assert_array_equal(one.adapter[pair.a], two.adapter[pair.a])
    assert abs(one.adapter[pair.a][-1] @ next_one.adapter[pair.a][-1]) < 0.999


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Refresh(cast(Refactorize, FFA()), 1),
            "FFA does not sort directions; put a refactorization inside the refresh",
        ),
        (lambda: FedSVD(refresh=-1), "refresh is -1; set a number of directions from 1 up, or 0 for none"),
        (lambda: FedSVD(refresh=1, singular_values="both"), "refresh puts orthonormal rows into A"),
    ],
)
def test_what_means_nothing_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_all_of_a_pair_cannot_be_new() -> None:
    schema = TestEveryRound().schema()

    with pytest.raises(SchemaError, match=r"refresh = 3 would replace all of layer\.0\.query, whose rank is 3"):
        FedSVD(refresh=3).init(schema, schema.zeros(), 0)
