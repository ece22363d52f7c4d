"""Rewriting pairs around any strategy, against dense SVDs."""

from dataclasses import dataclass

import numpy as np
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Role
from fedloom.strategies.api import Plan, State, Strategy
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.robust.krum import krum
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.refactorize import OrthonormalStart, Refactorize
from fedloom.strategies.transforms.schedule import Schedule


class TestAround(StrategyConformance):
    @pytest.fixture(
        autouse=True,
        params=[
            lambda: Refactorize(FedAvg(), 2),
            lambda: Refactorize(krum(inner="fedavg")),
            lambda: NormBound(Refactorize(OrthonormalStart(FedAvg(train_head=False))), 1e3),
        ],
    )
    def _make(self, request: pytest.FixtureRequest) -> None:
        self.make = request.param

    def strategy(self) -> Strategy:
        made: Strategy = self.make()
        return made


@pytest.mark.parametrize("period", [1, 3])
def test_factors_are_those_of_a_dense_svd_in_the_rounds_of_the_period(period: int) -> None:
    battery = TestAround()
    schema, strategy = battery.schema(), FedSVD(period=period)
    draw = np.random.Generator(np.random.Philox(key=[1, 1]))
    start = {s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in schema.tensors}
    state = strategy.init(schema, start, 0)
    plain = Average(select(Role.LORA_B))
    for _ in range(4):
        updates = battery.updates(strategy, state)
        averaged = run_round(plain, state, updates).adapter
        state = run_round(strategy, state, updates)
        for pair in schema.pairs:
            b, a = (state.adapter[name].astype(np.float64) for name in (pair.b, pair.a))
            product = averaged[pair.b].astype(np.float64) @ averaged[pair.a]
            np.testing.assert_allclose(b @ a, product, atol=1e-6)
            if state.round % period:
                np.testing.assert_array_equal(state.adapter[pair.a], averaged[pair.a])
                continue
            u, sigma, vt = np.linalg.svd(product, full_matrices=False)
            rank = a.shape[0]
            sign = np.sign(np.sum(a * vt[:rank], axis=1))
            np.testing.assert_allclose(a, vt[:rank] * sign[:, None], atol=1e-5)
            np.testing.assert_allclose(b, u[:, :rank] * sigma[:rank] * sign, atol=1e-5)


@dataclass(frozen=True)
class Keeping(FedAvg):
    """Lets clients keep B."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        return Plan(train=LORA, broadcast=state.adapter, personal=frozenset({"layer.0.query.lora_B"}))


def test_what_would_stay_in_the_old_coordinates_is_refused() -> None:
    schema = TestAround().schema()
    strategy = Refactorize(Keeping())
    state = strategy.init(schema, schema.zeros(), 0)

    with pytest.raises(ConfigError, match=r"Keeping lets clients keep layer\.0\.query\.lora_B, and a refactorization"):
        strategy.plan(state, 0, "ada")
    with pytest.raises(ConfigError, match="refactorization period is 0; set a number of rounds from 1 up"):
        FedSVD(period=0)


def test_alternating_factors_may_be_rewritten_between_their_turns() -> None:
    """RoLoRA with an orthonormal A whenever B is trained: the model is that of plain RoLoRA after the same round."""
    b, a = (Average(select(role)) for role in (Role.LORA_B, Role.LORA_A))
    plain = Schedule((b, a), turn=lambda commits: commits % 2)
    strategy = Refactorize(plain)
    battery = TestAround()
    schema = battery.schema()
    draw = np.random.Generator(np.random.Philox(key=[2, 1]))
    start = {s.name: draw.normal(0, 0.3, s.shape).astype(np.float32) for s in schema.tensors}
    state = strategy.init(schema, start, 0)
    for _ in range(4):
        updates = battery.updates(strategy, state)
        expected = run_round(plain, state, updates).adapter
        state = run_round(strategy, state, updates)
        for pair in schema.pairs:
            a_now = state.adapter[pair.a].astype(np.float64)
            np.testing.assert_allclose(state.adapter[pair.b] @ a_now, expected[pair.b] @ expected[pair.a], atol=1e-5)
            np.testing.assert_allclose(a_now @ a_now.T, np.eye(len(a_now)), atol=1e-6)
