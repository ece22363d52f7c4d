"""What averaging factors does to the product, and that the one-factor methods are exact."""

import numpy as np
import pytest

from fedloom.core.schema import Array, Role, Schema, TensorSpec
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_to_bytes

SCHEMA = Schema((TensorSpec("a", "m", Role.LORA_A, (3, 9)), TensorSpec("b", "m", Role.LORA_B, (7, 3))), scale=0.5)
SHARES = (0.2, 0.3, 0.5)


def _updates(strategy: Strategy, state: State) -> list[Update]:
    draw = np.random.Generator(np.random.Philox(key=[3, state.round]))
    updates = []
    for index, share in enumerate(SHARES):
        plan = strategy.plan(state, state.round, str(index))
        specs = SCHEMA.select(plan.train).tensors
        delta = {spec.name: draw.normal(0, 1, spec.shape).astype(np.float32) for spec in specs}
        updates.append(Update(str(index), 10 * share, plan.broadcast, delta))
    return updates


def _committed(strategy: Strategy, state: State, updates: list[Update]) -> State:
    acc = None
    for update in updates:
        acc = strategy.fold(state, acc, update)
    return strategy.commit(state, acc)


def _factors(update: Update) -> tuple[Array, Array]:
    """A client's B and A after training, whether it trained them or not."""
    b, a = (update.value(n) if n in update.delta else update.start[n].astype(np.float64) for n in ("b", "a"))
    return b, a


def _mean_of_products(updates: list[Update]) -> Array:
    mean: Array = sum(
        (share * b @ a for share, (b, a) in zip(SHARES, map(_factors, updates), strict=True)), np.zeros(())
    )
    return mean


@pytest.mark.parametrize("strategy", [FFA(), FFA(orthonormal=True), FedSVD(), FedSVD(period=2)])
def test_mean_of_products_is_product_of_means_when_a_is_shared(strategy: Strategy) -> None:
    state = strategy.init(SCHEMA, starting_adapter(SCHEMA, 1), 1)
    for _ in range(4):
        updates = _updates(strategy, state)

        state = _committed(strategy, state, updates)

        product = state.adapter["b"].astype(np.float64) @ state.adapter["a"]
        np.testing.assert_allclose(product, _mean_of_products(updates), atol=3e-6)


def test_fedavg_on_pairs_is_off_by_the_covariance_of_the_factors() -> None:
    """sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A)."""
    strategy = FedAvg()
    state = strategy.init(SCHEMA, starting_adapter(SCHEMA, 1), 1)
    updates = _updates(strategy, state)

    after = _committed(strategy, state, updates).adapter

    b, a = after["b"].astype(np.float64), after["a"].astype(np.float64)
    error = _mean_of_products(updates) - b @ a
    pairs = [_factors(update) for update in updates]
    covariance = np.sum([p * (bk - b) @ (ak - a) for p, (bk, ak) in zip(SHARES, pairs, strict=True)], axis=0)
    np.testing.assert_allclose(error, covariance, atol=3e-6)
    assert np.abs(error).max() > 0.1


def test_fedpeft_on_its_kind_is_fedavg_to_the_byte() -> None:
    ends = []
    for strategy in (FedAvg(), FedPEFT(kind="lora")):
        state = strategy.init(SCHEMA, starting_adapter(SCHEMA, 1), 1)
        for _ in range(3):
            state = _committed(strategy, state, _updates(strategy, state))
        ends.append(state_to_bytes(state))

    assert ends[0] == ends[1]


def test_fedsvd_rewrites_only_when_its_round_has_come() -> None:
    strategy = FedSVD(period=3)
    state = strategy.init(SCHEMA, starting_adapter(SCHEMA, 1), 1)
    changed = []
    for _ in range(6):
        before = state.adapter["a"]
        state = _committed(strategy, state, _updates(strategy, state))
        changed.append(not np.array_equal(before, state.adapter["a"]))

    assert changed == [False, False, True, False, False, True]
