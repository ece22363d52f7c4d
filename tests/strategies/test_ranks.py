"""FlexLoRA, raFLoRA and HetLoRA: clients of unequal ranks, against dense matrices."""

from dataclasses import replace

import numpy as np
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Array, Pair, Schema
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.ranks.flexlora import FlexLoRA
from fedloom.strategies.ranks.hetlora import HetLoRA
from fedloom.strategies.ranks.raflora import RaFLoRA
from fedloom.strategies.ranks.ranked import rank_of

RANKS = {"ada": 1, "b*": 2}
METHODS = (FlexLoRA, RaFLoRA, HetLoRA)


def _begun(strategy: Strategy) -> tuple[State, list[Update]]:
    battery = TestByNorm()
    _, state = battery.begin()
    state = strategy.init(state.schema, state.adapter, 5)
    return state, battery.updates(strategy, state)


class TestByNorm(StrategyConformance):
    def strategy(self) -> Strategy:
        return HetLoRA(by_norm=False)


def _products(updates: list[Update], pair: Pair) -> list[Array]:
    return [update.value(pair.b) @ update.value(pair.a) for update in updates]


def _svd_cut(product: Array, rank: int) -> Array:
    u, sigma, vt = np.linalg.svd(product, full_matrices=False)
    found: Array = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return found


@pytest.mark.parametrize("make", METHODS)
def test_clients_get_the_first_rows_of_the_adapter_at_their_rank(make: type[FlexLoRA]) -> None:
    strategy = make(ranks=RANKS)
    state, _ = _begun(strategy)
    for client, rank in (("ada", 1), ("bo", 2), ("cy", None)):
        plan = strategy.plan(state, 0, client)

        assert plan.rank == rank
        for pair in state.schema.pairs:
            cut = rank or 3
            np.testing.assert_array_equal(plan.broadcast[pair.a], state.adapter[pair.a][:cut])
            np.testing.assert_array_equal(plan.broadcast[pair.b], state.adapter[pair.b][:, :cut])


def test_flexlora_loses_the_tail_of_the_mean_product_and_nothing_else() -> None:
    strategy = FlexLoRA(ranks=RANKS)
    state, updates = _begun(strategy)
    total = sum(update.weight for update in updates)

    after = run_round(strategy, state, updates).adapter

    for pair in state.schema.pairs:
        terms = zip(updates, _products(updates, pair), strict=True)
        mean: Array = sum((u.weight / total * each for u, each in terms), np.zeros(()))
        found = after[pair.b].astype(np.float64) @ after[pair.a]
        np.testing.assert_allclose(found, _svd_cut(mean, 3), atol=1e-6)
        tail = np.linalg.svd(mean, compute_uv=False)[3:]
        assert np.linalg.norm(mean - found) == pytest.approx(np.linalg.norm(tail), abs=1e-6)
        assert np.linalg.norm(tail) > 0.01
        one = after[pair.b][:, :1].astype(np.float64) @ after[pair.a][:1]
        np.testing.assert_allclose(one, _svd_cut(mean, 1), atol=1e-6)


def test_raflora_weighs_each_rank_among_those_who_have_it() -> None:
    strategy = RaFLoRA(ranks=RANKS)
    state, updates = _begun(strategy)
    ada, bo, cy = (update.weight for update in updates)
    counts = {"ada": [ada / (ada + bo + cy)], "bo": [bo / (ada + bo + cy), bo / (bo + cy)]}
    counts["cy"] = [cy / (ada + bo + cy), cy / (bo + cy), 1.0]

    after = run_round(strategy, state, updates).adapter

    for pair in state.schema.pairs:
        product = np.zeros((after[pair.b].shape[0], after[pair.a].shape[1]))
        for update in updates:
            for index, count in enumerate(counts[update.client]):
                b, a = update.value(pair.b)[:, index], update.value(pair.a)[index]
                product += count * np.outer(b, a)
        found = after[pair.b].astype(np.float64) @ after[pair.a]
        np.testing.assert_allclose(found, _svd_cut(product, 3), atol=1e-6)


def test_raflora_is_flexlora_where_ranks_are_equal() -> None:
    state, updates = _begun(FlexLoRA())

    ours, theirs = (run_round(each, state, updates).adapter for each in (RaFLoRA(), FlexLoRA()))

    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


def test_a_high_rank_does_not_collapse_where_few_have_it() -> None:
    """Nobody moves: FlexLoRA's ranks above the first shrink in every round by the others' share, raFLoRA's stay."""
    left = {}
    for make in (FlexLoRA, RaFLoRA):
        strategy = make(ranks={"ada": 1, "bo": 1})
        state, _ = _begun(strategy)
        norms = []
        for _ in range(6):
            updates = TestByNorm().updates(strategy, state)
            still = [replace(u, weight=1.0, delta={n: np.zeros_like(d) for n, d in u.delta.items()}) for u in updates]
            state = run_round(strategy, state, still)
            norms.append(np.linalg.norm(state.adapter[state.schema.pairs[0].b], axis=0)[1:])
        left[make] = norms[-1] / norms[0]

    np.testing.assert_allclose(left[FlexLoRA], 3.0**-5, rtol=1e-3)
    np.testing.assert_allclose(left[RaFLoRA], 1.0, rtol=1e-3)


@pytest.mark.parametrize("by_norm", [False, True])
def test_hetlora_averages_padded_values_by_weight_and_norm(by_norm: bool) -> None:
    strategy = HetLoRA(ranks=RANKS, by_norm=by_norm)
    state, updates = _begun(strategy)
    pairs = state.schema.pairs
    norms = [np.linalg.norm([np.linalg.norm(each) for pair in pairs for each in _products([u], pair)]) for u in updates]
    weights = np.array([u.weight * (norm if by_norm else 1.0) for u, norm in zip(updates, norms, strict=True)])

    after = run_round(strategy, state, updates).adapter

    for name in state.schema.names(*LORA) | state.schema.names("head"):
        expected = np.zeros(after[name].shape)
        for update, share in zip(updates, weights / weights.sum(), strict=True):
            value = update.value(name)
            expected[tuple(map(slice, value.shape))] += share * value
        np.testing.assert_allclose(after[name], expected, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_hetlora_of_equal_ranks_and_weights_is_the_mean_of_what_was_sent(rank: int) -> None:
    """What is padded and cut again is what it was: clients at rank r get the mean factors of rank r back."""
    strategy = HetLoRA(ranks={"*": rank}, by_norm=False)
    state, updates = _begun(strategy)
    updates = [replace(update, weight=2.0) for update in updates]

    after = run_round(strategy, state, updates)

    plan = strategy.plan(after, 1, "ada")
    for name in state.schema.names(*LORA, "head"):
        mean = np.mean([update.value(name) for update in updates], axis=0)
        np.testing.assert_allclose(plan.broadcast[name], mean, atol=1e-6)
    for pair in state.schema.pairs:
        assert not after.adapter[pair.a][rank:].any()
        assert not after.adapter[pair.b][:, rank:].any()
    if rank == state.schema.rank:
        plain = run_round(FedAvg(), state, updates)
        for name, tensor in plain.adapter.items():
            np.testing.assert_allclose(after.adapter[name], tensor, atol=1e-6)


def test_products_of_zero_still_have_a_mean() -> None:
    strategy = HetLoRA()
    state, updates = _begun(strategy)
    gone = [replace(u, delta={n: -u.start[n] if "lora_B" in n else d for n, d in u.delta.items()}) for u in updates]

    after = run_round(strategy, state, gone).adapter

    for pair in state.schema.pairs:
        np.testing.assert_allclose(after[pair.b], 0.0, atol=1e-6)
        assert np.isfinite(after[pair.a]).all()


def test_the_first_pattern_that_fits_a_name_gives_the_rank() -> None:
    table = {"lab-7": 3, "lab-*": 2, "*": 1}

    assert [rank_of(table, name, 8) for name in ("lab-7", "lab-8", "clinic")] == [3, 2, 1]
    assert rank_of({}, "clinic", 8) == 8
    assert rank_of({"Lab-*": 2}, "lab-1", 8) == 8, "case counts"


@pytest.mark.parametrize("make", METHODS)
def test_ranks_that_there_are_not_are_refused(make: type[FlexLoRA]) -> None:
    with pytest.raises(ConfigError, match="rank 0; at least 1 is allowed"):
        make(ranks={"x": 0})
    schema: Schema = TestByNorm().schema()
    with pytest.raises(ConfigError, match=r"rank 9; 1 to adapter\.rank = 3 is allowed"):
        make(ranks={"x": 9}).init(schema, schema.zeros(), 0)
