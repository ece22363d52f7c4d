"""The bound on norms: closed form, extremes, and the battery around strategies of every kind."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, UpdateRejected
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import Strategy, Traits, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.transforms.norm_bound import NormBound, norm
from fedloom.strategies.transforms.user_level_dp import UserLevel

TWO = Schema((TensorSpec("b", "m", Role.BIAS, (2,)), TensorSpec("c", "n", Role.BIAS, (2,))))


def sent(b: list[float], c: list[float], weight: float = 1.0) -> Update:
    return Update("ada", weight, TWO.zeros(), {"b": np.array(b, np.float32), "c": np.array(c, np.float32)})


def committed(bound: float, *updates: Update) -> np.ndarray:
    strategy = NormBound(FedAvg(), bound)
    after = run_round(strategy, strategy.init(TWO, TWO.zeros(), 0), updates)
    return np.concatenate([after.adapter["b"], after.adapter["c"]])


def test_a_short_update_is_left_alone_and_a_long_one_is_cut_to_the_bound() -> None:
    """One norm over all tensors: 2, 4, 4 and 8 have 10."""
    within = committed(10.0, sent([2, 4], [4, 8]))
    beyond = committed(5.0, sent([2, 4], [4, 8]))

    np.testing.assert_array_equal(within, [2, 4, 4, 8])
    np.testing.assert_allclose(beyond, [1, 2, 2, 4], rtol=1e-6)


@pytest.mark.parametrize("exponent", range(-30, 39, 4))
def test_nothing_moves_the_adapter_further_than_the_bound(exponent: int) -> None:
    size = min(10.0**exponent, float(np.finfo(np.float32).max))

    moved = np.linalg.norm(committed(0.25, sent([size, -size], [size, size])).astype(np.float64))

    assert moved <= 0.25 * (1 + 1e-6)
    assert moved == pytest.approx(min(0.25, 2 * size), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_not_scaled(value: float) -> None:
    with pytest.raises(UpdateRejected):
        committed(1.0, sent([value, 1.0], [1.0, 1.0]))


def test_weights_stay_the_inner_strategys() -> None:
    moved = committed(5.0, sent([30, 40], [0, 0], weight=3.0), sent([0, 1], [0, 0], weight=1.0))

    np.testing.assert_allclose(moved, [2.25, 3.25, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf])
def test_a_bound_is_positive_and_finite(bound: float) -> None:
    with pytest.raises(ConfigError, match="norm bound is"):
        NormBound(FedAvg(), bound)


def test_it_declares_what_the_inner_strategy_does_but_is_not_linear() -> None:
    around_krum, around_svd = NormBound(krum(num_byzantine=2), 1.0), NormBound(FedSVD(), 1.0)

    kept = Traits(same_tensors=True, keeps_updates=True, unweighted=True, least_updates=7)
    assert around_krum.traits == kept
    assert around_svd.traits == Traits(same_tensors=True, rewrites=True)
    with pytest.raises(ConfigError, match="NormBound does not declare the trait linear"):
        UserLevel(around_svd, bytes(32), 3, 1.0, 1.0)


class TestFarBound(StrategyConformance):
    """With a bound that nobody reaches the laws of the inner strategy hold."""

    @pytest.fixture(
        autouse=True,
        params=[lambda: NormBound(FedAvg(), 1e3), lambda: NormBound(FedSVD(), 1e3), lambda: NormBound(krum(), 1e3)],
    )
    def _make(self, request: pytest.FixtureRequest) -> None:
        self.make: Callable[[], Strategy] = request.param

    def strategy(self) -> Strategy:
        return self.make()


class TestNearBound(StrategyConformance):
    """With one that everybody reaches, a lone client moves the model by the bound along its own direction."""

    def strategy(self) -> Strategy:
        return NormBound(FedAvg(), 0.5)

    def test_one_client_becomes_the_model(self) -> None:
        strategy, state = self.begin()
        for index in range(3):
            update = self.respond(state.schema, strategy.plan(state, state.round, "ada"), "ada", index)
            assert norm(update) > 0.5

            after = run_round(strategy, state, [update])

            for name, tensor in update.delta.items():
                expected = state.adapter[name] + tensor * (0.5 / norm(update))
                np.testing.assert_allclose(after.adapter[name], expected, atol=1e-6)
            state = after

    def test_coordinates_stay_unless_declared(self) -> None:
        strategy, state = self.begin()
        update = self.respond(state.schema, strategy.plan(state, 0, "ada"), "ada", 0)

        after = run_round(strategy, state, [update])

        step = np.concatenate([(after.adapter[n] - t).ravel() for n, t in state.adapter.items()])
        along = np.concatenate([update.delta[n].ravel() for n in state.adapter])
        np.testing.assert_allclose(step, along * (0.5 / norm(update)), atol=1e-6)

    def test_equal_updates_become_the_model(self) -> None:
        strategy, state = self.begin()
        update = self.respond(state.schema, strategy.plan(state, 0, "ada"), "ada", 0)

        one = run_round(strategy, state, [update])
        many = run_round(strategy, state, [replace(update, client=str(k), weight=k + 1.0) for k in range(3)])

        for name, tensor in one.adapter.items():
            np.testing.assert_allclose(many.adapter[name], tensor, atol=1e-6)
