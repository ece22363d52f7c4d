"""Discounts of old updates."""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Strategy, Traits, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedopt import FedOpt
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.state import state_to_bytes
from fedloom.strategies.transforms.buffered import Buffered

SCALAR = Schema((TensorSpec("b", "m", Role.BIAS, (1,)),))


class TestFresh(StrategyConformance):
    """Without old updates it is its inner strategy."""

    def strategy(self) -> Strategy:
        return Buffered(FedAvg())


def test_changes_count_by_their_age_and_weights_stay() -> None:
    """Three commits old is worth half: (1 * 2 * 0.5 + 3 * 1) / (1 + 3)."""
    strategy = Buffered(FedAvg())
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)
    old = Update("ada", 1.0, SCALAR.zeros(), {"b": np.array([2.0], np.float32)}, staleness=3)
    fresh = Update("bo", 3.0, SCALAR.zeros(), {"b": np.array([1.0], np.float32)})

    assert run_round(strategy, state, [old, fresh]).adapter["b"][0] == 1.0
    assert run_round(strategy, state, [replace(old, staleness=1)]).adapter["b"][0] == np.float32(np.sqrt(2))


@pytest.mark.parametrize(("staleness", "factor"), [(0, 1.0), (1, 2**-0.5), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_a_change_counts_by_the_root_of_its_age(staleness: int, factor: float) -> None:
    strategy = Buffered(FedAvg())
    state = strategy.init(SCALAR, SCALAR.zeros(), 0)
    update = Update("ada", 1.0, SCALAR.zeros(), {"b": np.array([2.0], np.float32)}, staleness=staleness)

    assert run_round(strategy, state, [update]).adapter["b"][0] == pytest.approx(2 * factor, rel=1e-7)


def test_a_buffer_of_the_whole_cohort_without_old_updates_is_fedavg_to_the_byte() -> None:
    battery, ends = TestFresh(), []
    for strategy in (Buffered(FedAvg()), FedAvg()):
        _, state = battery.begin()
        for _ in range(3):
            updates = battery.updates(strategy, state)
            assert {update.staleness for update in updates} == {0}
            state = run_round(strategy, state, updates)
        ends.append(state_to_bytes(state))

    assert ends[0] == ends[1]


def test_it_is_not_linear_whatever_is_inside() -> None:
    assert Buffered(FedAvg()).traits == Traits(same_tensors=True)
    assert Buffered(FedOpt()).traits == Traits(same_tensors=True, moments=True)


@pytest.mark.parametrize("inner", [FedSVD(), krum(), Buffered(FedAvg())])
def test_what_an_old_change_does_not_fit_is_refused(inner: Strategy) -> None:
    with pytest.raises(ConfigError, match=f"strategy {type(inner).__name__} cannot use changes made from an older"):
        Buffered(inner)
