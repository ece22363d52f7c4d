"""Methods that train one factor at a time: whose turn it is, exact averages, and what rests."""

import numpy as np
import pytest

from fedloom.core.schema import Role
from fedloom.proto.messages import moving
from fedloom.strategies.alternating.la_lora import LALoRA
from fedloom.strategies.alternating.orthonormal import AlternatingOrthonormal
from fedloom.strategies.alternating.rolora import RoLoRA
from fedloom.strategies.api import Strategy
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.state import state_to_bytes


class TestBattery(StrategyConformance):
    def strategy(self) -> Strategy:
        return AlternatingOrthonormal()


@pytest.mark.parametrize("strategy", [RoLoRA(), AlternatingOrthonormal()], ids=lambda each: type(each).__name__)
def test_factors_take_turns_and_every_average_is_exact(strategy: Strategy) -> None:
    battery = TestBattery()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    for round in range(6):
        moving, resting = (Role.LORA_B, Role.LORA_A) if round % 2 == 0 else (Role.LORA_A, Role.LORA_B)
        updates = battery.updates(strategy, state)
        assert state.schema.select(strategy.plan(state, round, "ada").train).roles == {moving, Role.HEAD}
        total = sum(update.weight for update in updates)

        after = run_round(strategy, state, updates)

        for pair in state.schema.pairs:
            mean = np.zeros((after.adapter[pair.b].shape[0], after.adapter[pair.a].shape[1]))
            for update in updates:
                b, a = ((update.value(n) if n in update.delta else state.adapter[n]) for n in (pair.b, pair.a))
                mean += update.weight / total * b @ a
            np.testing.assert_allclose(
                after.adapter[pair.b].astype(np.float64) @ after.adapter[pair.a], mean, atol=2e-6
            )
            if isinstance(strategy, RoLoRA):
                name = pair.a if resting == Role.LORA_A else pair.b
                np.testing.assert_array_equal(after.adapter[name], state.adapter[name])
        state = after


def test_what_rests_is_orthonormal_in_every_round_and_the_first() -> None:
    strategy, battery = AlternatingOrthonormal(), TestBattery()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    spans = []
    for round in range(6):
        for pair in state.schema.pairs:
            b, a = (state.adapter[name].astype(np.float64) for name in (pair.b, pair.a))
            gram = a @ a.T if round % 2 == 0 else b.T @ b
            np.testing.assert_allclose(gram, np.eye(3), atol=1e-6)
        spans.append(np.linalg.qr(state.adapter[state.schema.pairs[1].a].T.astype(np.float64))[0])
        state = run_round(strategy, state, battery.updates(strategy, state))

    kept = np.linalg.norm(spans[0].T @ spans[-1]) ** 2 / 3
    assert kept < 0.99, "unlike FedSVD's, the span of A is learned"


def test_it_begins_at_the_base_model_and_a_rest_of_zero_stays_finite() -> None:
    """B is zero before the first round; if nobody moves it, A's turn comes over columns that nothing fixes."""
    strategy, battery = AlternatingOrthonormal(), TestBattery()
    _, begun = battery.begin()
    fresh = {n: np.zeros_like(v) if "lora_B" in n else v for n, v in begun.adapter.items()}
    state = strategy.init(begun.schema, fresh, 5)
    for _ in range(3):
        updates = battery.updates(strategy, state)
        for update in updates:
            for each in update.delta.values():
                each[...] = 0

        state = run_round(strategy, state, updates)

        for pair in state.schema.pairs:
            assert np.isfinite(state.adapter[pair.a]).all()
            assert not (state.adapter[pair.b].astype(np.float64) @ state.adapter[pair.a]).any()


def test_la_lora_lets_b_and_a_take_turns_and_averages_as_fedavg_does() -> None:
    """Both factors move within a round, so the product of the means misses the covariance of the factors."""
    strategy, battery = LALoRA(), TestBattery()
    _, state = battery.begin()
    plan = strategy.plan(strategy.init(state.schema, state.adapter, 5), 0, "ada")

    assert plan.turns == (Role.LORA_B, Role.LORA_A)
    assert moving(state.schema, plan.train, plan.turns) == (
        state.schema.names(Role.LORA_B, Role.HEAD),
        state.schema.names(Role.LORA_A, Role.HEAD),
    )
    assert not LALoRA(train_head=False).plan(state, 0, "ada").train & {Role.HEAD}
    updates = battery.updates(strategy, strategy.init(state.schema, state.adapter, 5))
    ends = [run_round(each, each.init(state.schema, state.adapter, 5), updates) for each in (strategy, FedAvg())]
    assert state_to_bytes(ends[0]) == state_to_bytes(ends[1])
    shares = [update.weight / sum(each.weight for each in updates) for update in updates]
    for pair in state.schema.pairs:
        factors = [(update.value(pair.b), update.value(pair.a)) for update in updates]
        mean = sum(share * b @ a for share, (b, a) in zip(shares, factors, strict=True))
        product = ends[0].adapter[pair.b].astype(np.float64) @ ends[0].adapter[pair.a]
        assert np.abs(mean - product).max() > 0.01
