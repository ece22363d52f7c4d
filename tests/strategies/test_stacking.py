"""FLoRA, FLoRIST, FedEx-LoRA and LoRA-FAIR against dense matrices."""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import Array, Pair, Role, Schema, TensorSpec
from fedloom.strategies.api import State, Strategy, Update, corrections
from fedloom.strategies.conformance import StrategyConformance, effective, respond, run_round
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.stacking.fedex import FedEx
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.stacking.florist import FLoRIST
from fedloom.strategies.stacking.lora_fair import LoRAFAIR
from fedloom.strategies.stacking.stack import keep, stack
from fedloom.strategies.start import starting_adapter

RANKS = {"ada": 1, "b*": 2}


class TestRanked(StrategyConformance):
    """FLoRA whose clients work at ranks 1, 2 and 3."""

    def strategy(self) -> Strategy:
        return FLoRA(ranks=RANKS)

    def test_one_client_becomes_the_model(self) -> None:
        """Its rank is 1, so that the adapter it starts from is only part of what the state holds."""
        strategy, state = self.begin()
        fresh = strategy.init(state.schema, {**state.adapter, **_without_products(state)}, 5)
        (update,) = [each for each in self.updates(strategy, fresh) if each.client == "ada"]

        after = run_round(strategy, fresh, [update])

        for pair in fresh.schema.pairs:
            found = _corrections(after, pair)
            np.testing.assert_allclose(found, update.value(pair.b) @ update.value(pair.a), atol=1e-6)

    def test_equal_updates_become_the_model(self) -> None:
        """Clients of unequal ranks cannot move alike."""
        pytest.skip("see the exactness test")


class TestCutResidual(StrategyConformance):
    def strategy(self) -> Strategy:
        return FedEx(residual_rank=1)


def _without_products(state: State) -> dict[str, Array]:
    return {pair.b: np.zeros_like(state.adapter[pair.b]) for pair in state.schema.pairs}


def _corrections(state: State, pair: Pair) -> Array:
    found: Array = state.memory[f"{pair.module}.base_B"].astype(np.float64) @ state.memory[f"{pair.module}.base_A"]
    return found


def _mean_product(updates: list[Update], pair: Pair) -> Array:
    total = sum(update.weight for update in updates)
    found: Array = sum(
        (update.weight / total * update.value(pair.b) @ update.value(pair.a) for update in updates), np.zeros(())
    )
    return found


def _begun(strategy: Strategy) -> tuple[State, list[Update]]:
    """A state after a round, and three updates to it."""
    battery = TestRanked()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    state = run_round(strategy, state, battery.updates(strategy, state))
    return state, battery.updates(strategy, state)


def test_a_stack_is_the_sum_of_products_in_float64_whatever_the_ranks() -> None:
    state, updates = _begun(FLoRA(ranks=RANKS))
    kept = None
    for update in updates:
        kept = keep(state.schema.with_rank({"ada": 1, "bo": 2, "cy": 3}[update.client]), kept, update)
    assert kept is not None
    for pair in state.schema.pairs:
        b, a = stack(kept, pair)

        assert b.shape[1] == 1 + 2 + 3
        np.testing.assert_allclose(b @ a, _mean_product(updates, pair), atol=1e-14)
        np.testing.assert_allclose(np.matmul(*refactorize(b, a)), b @ a, atol=1e-13)


def test_a_stack_takes_a_scale_for_each_client() -> None:
    """sum_k p_k s_k B_k A_k for unequal ranks and scales."""
    state, updates = _begun(FLoRA(ranks=RANKS))
    scales, ranks = {"ada": 4.0, "bo": 0.5, "cy": 1.25}, {"ada": 1, "bo": 2, "cy": 3}
    total = sum(update.weight for update in updates)
    kept = None
    for update in updates:
        kept = keep(state.schema.with_rank(ranks[update.client]), kept, update)
    assert kept is not None
    for pair in state.schema.pairs:
        b, a = stack(kept, pair, lambda update, share: share * scales[update.client])

        terms = [u.weight / total * scales[u.client] * u.value(pair.b) @ u.value(pair.a) for u in updates]
        np.testing.assert_allclose(b @ a, np.sum(terms, axis=0), atol=1e-14)


def test_flora_moves_the_model_by_the_mean_of_what_the_clients_added_to_it() -> None:
    """W0 + sum_k p_k s_k B_k A_k: a client at a lower rank keeps the adapter's scale, so that all s_k are s."""
    strategy = FLoRA(ranks=RANKS)
    state, updates = _begun(strategy)
    assert {state.schema.with_rank(rank).scale for rank in (1, 2, 3)} == {2.0}
    before = {pair: _corrections(state, pair) for pair in state.schema.pairs}

    found = effective(state.schema, strategy.result(run_round(strategy, state, updates)))

    for pair in state.schema.pairs:
        expected = 2.0 * before[pair] + 2.0 * _mean_product(updates, pair)
        np.testing.assert_allclose(found[pair.module], expected, atol=5e-6)


@pytest.mark.parametrize("ranks", [{}, RANKS], ids=["equal", "unequal"])
def test_flora_folds_the_mean_of_the_products_and_begins_anew(ranks: dict[str, int]) -> None:
    strategy = FLoRA(ranks=ranks)
    state, updates = _begun(strategy)

    after = run_round(strategy, state, updates)

    for pair in state.schema.pairs:
        expected = _corrections(state, pair) + _mean_product(updates, pair)
        np.testing.assert_allclose(_corrections(after, pair), expected, atol=2e-6)
        assert not after.adapter[pair.b].any()
        assert not np.allclose(after.adapter[pair.a], state.adapter[pair.a]), "drawn for each round"
    again = run_round(strategy, state, updates)
    np.testing.assert_array_equal(again.adapter[pair.a], after.adapter[pair.a])
    ranks_found = {each.shape[0] for name, each in corrections(after).items() if name.endswith("base_A")}
    assert ranks_found == {5}, "never of more rank than a weight has: min(4, 7) and min(6, 5)"


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_florist_keeps_the_fewest_singular_values_that_hold_the_energy(energy: float) -> None:
    strategy = FLoRIST(energy=energy)
    battery = TestRanked()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    updates = battery.updates(strategy, state)

    after = run_round(strategy, state, updates)

    for pair in state.schema.pairs:
        product = _mean_product(updates, pair)
        u, sigma, vt = np.linalg.svd(product, full_matrices=False)
        share = np.cumsum(sigma**2) / np.sum(sigma**2)
        rank = next(count for count in range(1, len(sigma) + 1) if share[count - 1] >= energy * (1 - 1e-12))
        np.testing.assert_allclose(_corrections(after, pair), (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-6)
        lost = np.linalg.norm(product - _corrections(after, pair)) / np.linalg.norm(product)
        assert lost <= np.sqrt(1 - energy) + 1e-6


def test_fedex_is_the_mean_of_the_clients_models() -> None:
    strategy, battery = FedEx(), TestCutResidual()
    _, state = battery.begin()
    for _ in range(4):
        updates = battery.updates(strategy, state)
        values = [{**u.start, **{n: u.value(n) for n in u.delta}} for u in updates]
        models = [effective(state.schema, each) for each in values]
        shares = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)

        state = run_round(strategy, state, updates)

        for name, tensor in effective(state.schema, strategy.result(state)).items():
            expected = np.tensordot(shares, np.stack([model[name] for model in models]), axes=1)
            np.testing.assert_allclose(tensor, expected, atol=1e-5)


def test_fedex_cuts_the_residual_to_its_best_approximation() -> None:
    battery = TestCutResidual()
    _, state = battery.begin()
    updates = battery.updates(FedEx(), state)

    after = run_round(FedEx(residual_rank=2), state, updates)

    for pair in state.schema.pairs:
        mean = after.adapter[pair.b].astype(np.float64) @ after.adapter[pair.a]
        u, sigma, vt = np.linalg.svd(_mean_product(updates, pair) - mean, full_matrices=False)
        np.testing.assert_allclose(_corrections(after, pair), (u[:, :2] * sigma[:2]) @ vt[:2], atol=1e-6)
        assert sigma[2] > 0.01, "something is cut"


def test_the_residual_is_the_covariance_of_the_factors() -> None:
    battery = TestCutResidual()
    _, state = battery.begin()
    updates = battery.updates(FedEx(), state)
    total = sum(update.weight for update in updates)

    after = run_round(FedEx(), state, updates)

    for pair in state.schema.pairs:
        b, a = after.adapter[pair.b].astype(np.float64), after.adapter[pair.a].astype(np.float64)
        covariance = sum(u.weight / total * (u.value(pair.b) - b) @ (u.value(pair.a) - a) for u in updates)
        np.testing.assert_allclose(_corrections(after, pair), covariance, atol=1e-5)


@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_the_residual_has_the_rank_of_the_clients_less_one(clients: int) -> None:
    """sum_k p_k (B_k - B)(A_k - A) has rank (K - 1) r and not the stack's K r: changes from a mean are dependent."""
    shapes = (("m.lora_A", Role.LORA_A, (2, 20)), ("m.lora_B", Role.LORA_B, (16, 2)))
    schema = Schema(tuple(TensorSpec(name, "m", role, shape) for name, role, shape in shapes), scale=2.0)
    strategy, (pair,) = FedEx(), schema.pairs
    state = strategy.init(schema, starting_adapter(schema, 1), 1)
    names = [f"c{index}" for index in range(clients)]
    updates = [respond(schema, strategy.plan(state, 0, name), name, index) for index, name in enumerate(names)]

    after = run_round(strategy, state, updates)

    sigma = np.linalg.svd(_corrections(after, pair), compute_uv=False)
    assert np.sum(sigma > 1e-5) == 2 * (clients - 1)
    # What is stored takes in the means as well, for their rounding to float32.
    assert after.memory["m.base_A"].shape[0] <= 2 * (clients + 1)


def _objective(move: Array, b: Array, a: Array, product: Array, penalty: float) -> float:
    return float(np.sum((product - (b + move) @ a) ** 2) + penalty * np.sum(move**2))


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_lora_fair_is_at_the_minimum(penalty: float) -> None:
    battery = TestCutResidual()
    _, state = battery.begin()
    updates = battery.updates(LoRAFAIR(), state)
    plain = run_round(FedEx(), state, updates).adapter

    after = run_round(LoRAFAIR(penalty=penalty), state, updates).adapter

    draw = np.random.default_rng(1)
    for pair in state.schema.pairs:
        b, a = plain[pair.b].astype(np.float64), plain[pair.a].astype(np.float64)
        product = _mean_product(updates, pair)
        move = after[pair.b].astype(np.float64) - b
        np.testing.assert_array_equal(after[pair.a], plain[pair.a])
        least = _objective(move, b, a, product, penalty)
        for _ in range(20):
            aside = draw.normal(size=move.shape)
            assert _objective(move + 1e-2 * aside, b, a, product, penalty) > least
        gradient = -2 * (product - (b + move) @ a) @ a.T + 2 * penalty * move
        assert np.abs(gradient).max() < 1e-5
    assert np.abs(move).max() > 1e-2


def test_a_large_penalty_is_fedavg_and_a_small_one_projects() -> None:
    battery = TestCutResidual()
    _, state = battery.begin()
    updates = battery.updates(LoRAFAIR(), state)
    plain = run_round(FedEx(), state, updates).adapter

    still = run_round(LoRAFAIR(penalty=1e9), state, updates).adapter
    free = run_round(LoRAFAIR(penalty=1e-9), state, updates).adapter

    for pair in state.schema.pairs:
        np.testing.assert_allclose(still[pair.b], plain[pair.b], atol=1e-6)
        a = plain[pair.a].astype(np.float64)
        projected = _mean_product(updates, pair) @ np.linalg.pinv(a) @ a
        np.testing.assert_allclose(free[pair.b].astype(np.float64) @ a, projected, atol=1e-5)


def test_the_head_is_averaged_beside_the_stacks() -> None:
    battery = TestRanked()
    for strategy in (FLoRA(), FedEx(), LoRAFAIR()):
        _, state = battery.begin()
        updates = [respond(state.schema, strategy.plan(state, 0, c), c, i) for i, c in enumerate(("ada", "bo"))]
        after = run_round(strategy, state, updates)
        total = sum(update.weight for update in updates)
        for name in state.schema.names(Role.HEAD):
            moved = sum(update.weight / total * update.delta[name].astype(np.float64) for update in updates)
            np.testing.assert_allclose(after.adapter[name], state.adapter[name] + moved, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FLoRA(ranks={"phone-*": 0}), r"ranks gives clients 'phone-\*' rank 0; at least 1 is allowed"),
        (lambda: FLoRIST(energy=0.0), "energy is 0.0; set a share above 0 and up to 1"),
        (lambda: FedEx(residual_rank=-1), "residual_rank is -1; set a rank, or 0 to cut nothing off"),
        (lambda: LoRAFAIR(penalty=0.0), "penalty is 0.0; set a positive number"),
    ],
)
def test_what_means_nothing_is_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


def test_a_rank_above_the_adapters_is_refused() -> None:
    _, state = TestRanked().begin()

    with pytest.raises(ConfigError, match=r"ranks gives clients 'ada' rank 4; 1 to adapter\.rank = 3 is allowed"):
        FLoRA(ranks={"ada": 4}).init(state.schema, state.adapter, 0)


def test_an_update_of_another_rank_is_refused() -> None:
    strategy = FLoRA(ranks=RANKS)
    state, (*_, update) = _begun(strategy)

    with pytest.raises(SchemaError, match="has shape"):
        strategy.fold(state, None, replace(update, client="ada"))
