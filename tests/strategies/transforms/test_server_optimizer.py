"""Server optimizers against the papers' formulas in dense numpy, and what they are refused with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedopt import FedOpt
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.refactorize import Refactorize
from fedloom.strategies.transforms.schedule import Schedule
from fedloom.strategies.transforms.server_optimizer import Optimizer, ServerOptimizer
from fedloom.strategies.transforms.user_level_dp import UserLevel

Float64 = npt.NDArray[np.float64]
NAMES: tuple[Optimizer, ...] = ("momentum", "adagrad", "adam", "yogi")
SCHEMA = Schema((TensorSpec("b", "m", Role.BIAS, (5,)), TensorSpec("head", "head", Role.HEAD, (2, 3))))


def paper(name: str, changes: list[Float64], rate: float, beta1: float, beta2: float, tau: float) -> Float64:
    """How far algorithm 2 of Reddi et al. (or FedAvgM) has moved the model after these mean changes."""
    x, m, v = np.zeros_like(changes[0]), np.zeros_like(changes[0]), np.full_like(changes[0], tau**2)
    for delta in changes:
        if name == "momentum":
            m = beta1 * m + delta
            x = x + rate * m
            continue
        m = beta1 * m + (1 - beta1) * delta
        if name == "adagrad":
            v = v + delta**2
        elif name == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + rate * m / (np.sqrt(v) + tau)
    return x


def rounds(strategy: Strategy, count: int) -> tuple[State, dict[str, list[Float64]]]:
    """A run of two unequal clients, and the mean changes it went by."""
    state = strategy.init(SCHEMA, SCHEMA.zeros(), 0)
    draw = np.random.Generator(np.random.Philox(key=[3, 3]))
    means: dict[str, list[Float64]] = {spec.name: [] for spec in SCHEMA.tensors}
    for _ in range(count):
        deltas = [{s.name: draw.normal(0, 0.2, s.shape).astype(np.float32) for s in SCHEMA.tensors} for _ in range(2)]
        for name in means:
            means[name].append((deltas[0][name].astype(np.float64) + 3.0 * deltas[1][name]) / 4.0)
        updates = [Update(f"c{k}", (1.0, 3.0)[k], state.adapter, deltas[k]) for k in range(2)]
        state = run_round(strategy, state, updates)
    return state, means


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("beta1", "tau"), [(0.9, 1e-3), (0.0, 0.1)])
def test_it_goes_where_the_paper_goes(name: Optimizer, beta1: float, tau: float) -> None:
    state, means = rounds(ServerOptimizer(FedAvg(), name, 0.03, beta1, 0.99, tau), 7)

    for tensor, changes in means.items():
        expected = paper(name, changes, 0.03, beta1, 0.99, tau)
        np.testing.assert_allclose(state.adapter[tensor], expected, rtol=0, atol=2e-7)


def test_one_step_of_adam_is_the_number_worked_out_by_hand() -> None:
    """Change 0.5, rate 0.1: m = 0.05 and v = 1e-6 * 0.99 + 0.0025, hence 0.1 * 0.05 / (0.0500095 + 0.001)."""
    schema = Schema((TensorSpec("b", "m", Role.BIAS, (1,)),))
    strategy = ServerOptimizer(FedAvg(), "adam", 0.1)
    state = strategy.init(schema, schema.zeros(), 0)

    after = run_round(strategy, state, [Update("ada", 1.0, state.adapter, {"b": np.array([0.5], np.float32)})])

    assert after.adapter["b"][0] == pytest.approx(0.09802, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # Changes 0.5 and 0.01, rate 0.1, betas 0.9 and 0.99, tau = 1e-3 and v = tau^2 before the first.
        ("momentum", 0.1 * 0.5, 0.1 * (0.45 + 0.01)),
        ("adagrad", 0.005 / (0.250001**0.5 + 0.001), 0.0046 / (0.250101**0.5 + 0.001)),
        ("adam", 0.005 / (0.00250099**0.5 + 0.001), 0.0046 / (0.0024769801**0.5 + 0.001)),
        # The second change is the smaller one, so that v falls from 0.002501 to 0.0025.
        ("yogi", 0.005 / (0.002501**0.5 + 0.001), 0.0046 / (0.05 + 0.001)),
    ],
)
def test_one_and_two_steps_are_the_numbers_worked_out_by_hand(name: Optimizer, first: float, second: float) -> None:
    schema = Schema((TensorSpec("b", "m", Role.BIAS, (1,)),))
    strategy = ServerOptimizer(FedAvg(), name, 0.1)
    state = strategy.init(schema, schema.zeros(), 0)
    found = []
    for change in (0.5, 0.01):
        delta = {"b": np.array([change], np.float32)}
        state = run_round(strategy, state, [Update("ada", 1.0, state.adapter, delta)])
        found.append(float(state.adapter["b"][0]))

    assert found == pytest.approx([first, first + second], abs=1e-7)


def test_momentum_without_memory_is_the_mean() -> None:
    plain, _ = rounds(FedAvg(), 4)
    stepped, _ = rounds(ServerOptimizer(FedAvg(), "momentum", 1.0, beta1=0.0), 4)

    for name, tensor in plain.adapter.items():
        np.testing.assert_allclose(stepped.adapter[name], tensor, atol=1e-7)


def test_moments_are_as_large_as_what_is_trained() -> None:
    battery = TestAdamOnB()
    strategy, state = battery.begin()
    state = run_round(strategy, state, battery.updates(strategy, state))

    trained = sum(state.adapter[name].size for name in state.schema.names(Role.LORA_B, Role.HEAD))
    assert sum(each.nbytes for each in state.memory.values()) == 2 * 8 * trained


class TestAdamOnB(StrategyConformance):
    def strategy(self) -> Strategy:
        return ServerOptimizer(FFA(), "adam", 0.1)


class TestOthers(StrategyConformance):
    @pytest.fixture(
        autouse=True,
        params=[
            lambda: FedOpt("yogi", inner="fedavg"),
            lambda: NormBound(ServerOptimizer(FFA(orthonormal=True), "adagrad", 0.1, beta1=0.0), 5.0),
            lambda: Schedule((ServerOptimizer(FFA(), "momentum", 0.5), FedAvg()), turn=lambda round: round % 2),
        ],
    )
    def _make(self, request: pytest.FixtureRequest) -> None:
        self.make: Callable[[], Strategy] = request.param

    def strategy(self) -> Strategy:
        return self.make()


def test_options_stay_what_they_are() -> None:
    assert replace(FedOpt(inner="fedavg"), beta1=0.0) == FedOpt(inner="fedavg", beta1=0.0)


class TestMomentumOfOne(StrategyConformance):
    """Without memory and at rate 1 it is its inner strategy, and every law of a mean holds."""

    def strategy(self) -> Strategy:
        return Undeclared(FedAvg(), "momentum", 1.0, beta1=0.0)


class Undeclared(ServerOptimizer):
    """Says nothing of its moments, so that the battery tries the laws they would break."""

    @property
    def traits(self) -> Any:
        return self.inner.traits


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ServerOptimizer(FedAvg(), cast(Optimizer, "adamw"), 0.1),
            "optimizer is 'adamw'; choose one of",
        ),
        (lambda: ServerOptimizer(FedAvg(), "adam", 0.0), "learning rate 0.0 and tau 0.001; both must be positive"),
        (lambda: ServerOptimizer(FedAvg(), "adam", np.nan), "both must be positive"),
        (lambda: ServerOptimizer(FedAvg(), "adam", 0.1, beta1=1.0), r"betas 1.0 and 0.99; both must lie in \[0, 1\)"),
        (lambda: ServerOptimizer(FedSVD(), "adam", 0.1), "FedSVD rewrites its coordinates, and moments of the old"),
        (lambda: ServerOptimizer(krum(), "adam", 0.1), "Robust does not declare the trait linear"),
        (lambda: ServerOptimizer(FedOpt(), "adam", 0.1), "FedOpt has a server optimizer already"),
        (lambda: FedOpt(inner="fedsvd"), "FedSVD rewrites its coordinates"),
        (lambda: Refactorize(FedOpt()), "FedOpt keeps second moments in the coordinates of A and B"),
        (lambda: Schedule((FedOpt(), FedSVD()), turn=lambda round: 0), "rewrites the coordinates that another keeps"),
        (
            lambda: UserLevel(FedOpt(), bytes(32), 3, 1.0, 1.0, "tree"),
            "FedOpt scales the changes of its rounds by moments, so that tree noise no longer cancels",
        ),
    ],
)
def test_what_means_nothing_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_noise_for_users_comes_before_the_optimizer() -> None:
    """The step is made of the noised mean: the moments never see what was not noised."""
    quiet, loud = (UserLevel(FedOpt("momentum", 1.0), bytes(32), 2, 1e-3, noise) for noise in (1e-6, 5.0))
    firsts = []
    for strategy in (quiet, loud):
        state = strategy.init(SCHEMA_LORA, SCHEMA_LORA.zeros(), 0)
        plan = strategy.plan(state, 0, "")
        delta = {name: np.full(state.adapter[name].shape, 1e-4, np.float32) for name in SCHEMA_LORA.names(*plan.train)}
        state = run_round(strategy, state, [Update(name, 1.0, plan.broadcast, delta) for name in "ab"])
        firsts.append(state.memory["server_optimizer/first/m.B"])

    assert np.abs(firsts[0] - 1e-4).max() < 1e-6
    assert np.abs(firsts[1] - 1e-4).max() > 1e-3


SCHEMA_LORA = Schema(
    (TensorSpec("m.A", "m", Role.LORA_A, (2, 5)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))), scale=2.0
)
