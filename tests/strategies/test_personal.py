"""FedSA-LoRA, FedPer and FedDPA: a part of the adapter is averaged; the other never leaves its client."""

import numpy as np
import pytest

from fedloom.core.errors import SchemaError
from fedloom.core.schema import Role
from fedloom.strategies.conformance import StrategyConformance, respond, run_round
from fedloom.strategies.personal.feddpa import FedDPA
from fedloom.strategies.personal.fedper import FedPer
from fedloom.strategies.personal.fedsa import FedSALoRA
from fedloom.strategies.start import starting_adapter
from tests.strategies.test_conformance import TWO_PAIRS


class TestSharedB(StrategyConformance):
    def strategy(self) -> FedSALoRA:
        return FedSALoRA(shared="B")


@pytest.mark.parametrize(("shared", "kept"), [("A", Role.LORA_B), ("B", Role.LORA_A)])
def test_one_factor_is_shared_and_the_other_stays(shared: str, kept: str) -> None:
    battery = TestSharedB()
    strategy = FedSALoRA(shared=shared)  # type: ignore[arg-type]
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    plan = strategy.plan(state, 0, "ada")
    updates = battery.updates(strategy, state)
    total = sum(update.weight for update in updates)

    after = run_round(strategy, state, updates)

    assert plan.personal == {kept}
    assert plan.train == state.schema.roles, "both are trained"
    for name, value in after.adapter.items():
        moved = [update.delta[name] for update in updates if name in update.delta]
        if name in state.schema.names(kept):
            assert not moved
            np.testing.assert_array_equal(value, state.adapter[name])
        else:
            mean = sum(u.weight / total * d.astype(np.float64) for u, d in zip(updates, moved, strict=True))
            np.testing.assert_allclose(value, state.adapter[name] + mean, atol=1e-6)


@pytest.mark.parametrize("shared", ["A", "B"])
def test_beside_a_kept_factor_the_mean_of_the_products_is_the_product_of_the_mean(shared: str) -> None:
    """What a client computes with is linear in what is shared: sum_j p_j B_k A_j = B_k A for its own B_k."""
    battery, strategy = TestSharedB(), FedSALoRA(shared=shared)  # type: ignore[arg-type]
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    updates = battery.updates(strategy, state)
    shares = [update.weight / sum(each.weight for each in updates) for update in updates]

    after = run_round(strategy, state, updates)

    draw = np.random.default_rng(6)
    for pair in state.schema.pairs:
        name, kept = (pair.a, pair.b) if shared == "A" else (pair.b, pair.a)
        ends = [update.value(name) for update in updates]
        mean = after.adapter[name].astype(np.float64)
        assert np.abs(mean - ends[0]).max() > 0.01
        for own in draw.normal(size=(len(updates), *state.adapter[kept].shape)):
            products = [own @ end if shared == "A" else end @ own for end in ends]
            expected = sum(share * product for share, product in zip(shares, products, strict=True))
            np.testing.assert_allclose(own @ mean if shared == "A" else mean @ own, expected, atol=2e-6)


def test_of_two_pairs_the_shared_one_is_averaged_and_the_own_one_stays() -> None:
    strategy = FedDPA()
    state = strategy.init(TWO_PAIRS, starting_adapter(TWO_PAIRS, 5), 5)
    plan = strategy.plan(state, 0, "ada")
    updates = [respond(TWO_PAIRS, strategy.plan(state, 0, name), name, k) for k, name in enumerate(("ada", "bo", "cy"))]
    total = sum(update.weight for update in updates)

    after = run_round(strategy, state, updates)

    assert plan.train == {"shared", "own", Role.HEAD}
    assert plan.personal == {"own"}
    assert FedDPA(train_head=False).plan(state, 0, "ada").train == {"shared", "own"}
    for name, value in after.adapter.items():
        if "own" in name:
            assert all(name not in update.delta for update in updates)
            np.testing.assert_array_equal(value, state.adapter[name])
        else:
            mean = sum(u.weight / total * u.delta[name].astype(np.float64) for u in updates)
            np.testing.assert_allclose(value, state.adapter[name] + mean, atol=1e-6)


def test_two_pairs_need_an_adapter_that_has_them() -> None:
    battery = TestSharedB()
    with pytest.raises(SchemaError, match="this strategy trains own, shared, but the adapter has head, lora_A, lora_B"):
        FedDPA().init(battery.schema(), starting_adapter(battery.schema(), 5), 5)


def test_the_adapter_is_averaged_and_the_head_stays() -> None:
    battery, strategy = TestSharedB(), FedPer()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    plan, updates = strategy.plan(state, 0, "ada"), battery.updates(strategy, state)
    total = sum(update.weight for update in updates)

    after = run_round(strategy, state, updates)

    assert plan.train == state.schema.roles, "both are trained"
    assert plan.personal == {Role.HEAD}
    for name, value in after.adapter.items():
        if name in state.schema.names(Role.HEAD):
            assert all(name not in update.delta for update in updates)
            np.testing.assert_array_equal(value, state.adapter[name])
        else:
            mean = sum(u.weight / total * u.delta[name].astype(np.float64) for u in updates)
            np.testing.assert_allclose(value, state.adapter[name] + mean, atol=1e-6)


def test_an_adapter_without_a_head_has_nothing_to_keep() -> None:
    schema = TestSharedB().schema()
    bare = schema.select(schema.roles - {Role.HEAD})
    with pytest.raises(SchemaError, match="trains an adapter and a head, but the adapter has lora_A, lora_B"):
        FedPer().init(bare, starting_adapter(bare, 5), 5)
    with pytest.raises(SchemaError, match="but the head is frozen; set model"):
        FedPer(train_head=False).init(schema, starting_adapter(schema, 5), 5)
