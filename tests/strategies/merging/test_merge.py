"""Whole adapters: truncation against the dense SVD, ranks, and the tensors beside the pairs."""

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.limits import MAX_RANK
from fedloom.strategies.merging.adapter import FinishedAdapter, Float64, Product
from fedloom.strategies.merging.greedy_soup import greedy_soup
from fedloom.strategies.merging.merge import Rank, merge
from fedloom.strategies.merging.methods.api import places
from fedloom.strategies.merging.methods.lines import LiNeS
from fedloom.strategies.merging.methods.soup import Soup
from fedloom.strategies.merging.methods.task_arithmetic import TaskArithmetic
from fedloom.strategies.merging.methods.ties import Ties

SHAPES = {"h.0.query": (12, 9), "h.1.query": (12, 9), "h.1.dense": (5, 20)}


def adapter(seed: int, rank: int = 3, **whole: list[float]) -> FinishedAdapter:
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    products = {
        name: Product(draw.normal(size=(out, rank)), draw.normal(size=(rank, inner)))
        for name, (out, inner) in SHAPES.items()
    }
    return FinishedAdapter(products, {name: np.array(value) for name, value in whole.items()})


def mean(adapters: list[FinishedAdapter], module: str) -> Float64:
    return np.asarray(np.mean([each.products[module].b @ each.products[module].a for each in adapters], axis=0))


def test_a_soup_loses_nothing_at_the_sum_of_the_ranks() -> None:
    adapters = [adapter(0), adapter(1, rank=2)]

    merged = merge(adapters, Soup())

    assert merged.adapter.rank == 5
    assert merged.error < 1e-14
    for module in SHAPES:
        np.testing.assert_allclose(merged.adapter.products[module].dense(), mean(adapters, module), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_nearest_matrix_and_says_how_far_it_is(rank: int) -> None:
    adapters = [adapter(0), adapter(1)]

    merged = merge(adapters, Soup(), rank=Rank(rank))

    squares = total = 0.0
    for layer in merged.layers:
        exact = mean(adapters, layer.module)
        u, sigma, vt = np.linalg.svd(exact)
        nearest = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        product = merged.adapter.products[layer.module]
        np.testing.assert_allclose(product.dense(), nearest, atol=1e-12)
        np.testing.assert_allclose(product.a @ product.a.T, np.eye(rank), atol=1e-12)
        assert layer.error == pytest.approx(np.linalg.norm(exact - nearest) / np.linalg.norm(exact), rel=1e-10)
        squares += float(np.sum((exact - nearest) ** 2))
        total += float(np.sum(exact**2))
    assert merged.error == pytest.approx(np.sqrt(squares / total), rel=1e-10)


def test_a_dense_method_is_truncated_likewise() -> None:
    adapters, method = [adapter(0), adapter(1)], Ties(density=0.3)

    merged = merge(adapters, method, rank=Rank(2))

    for module, place in places(SHAPES).items():
        exact = method.merge([each.products[module] for each in adapters], [1, 1], place)
        u, sigma, vt = np.linalg.svd(exact)
        np.testing.assert_allclose(merged.adapter.products[module].dense(), (u[:, :2] * sigma[:2]) @ vt[:2], atol=1e-12)
    assert 0.1 < merged.error < 1


def test_a_dense_method_keeps_all_when_asked_for_an_exact_rank() -> None:
    adapters, method = [adapter(0), adapter(1)], Ties(density=0.3)

    default, exact = merge(adapters, method), merge(adapters, method, rank=Rank())

    assert (default.adapter.rank, exact.adapter.rank) == (6, 9)
    assert default.error > 1e-2 > 1e-14 > exact.error


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_gives_the_least_rank_that_holds_it(energy: float) -> None:
    adapters = [adapter(0), adapter(1)]

    merged = merge(adapters, Soup(), rank=Rank(energy=energy))

    for layer in merged.layers:
        squares = np.linalg.svd(mean(adapters, layer.module), compute_uv=False) ** 2
        held = np.cumsum(squares) / np.sum(squares)
        assert layer.rank == int(np.argmax(held >= energy)) + 1
        assert 1 - layer.error**2 >= energy - 1e-12
    # Every layer of an adapter has the same rank: the others' further directions are zero.
    widest = max(layer.rank for layer in merged.layers)
    for layer in merged.layers:
        product = merged.adapter.products[layer.module]
        assert (product.b.shape[1], len(product.a)) == (widest, widest)
        assert not product.b[:, layer.rank :].any()


def test_the_exact_rank_of_equal_adapters_is_theirs() -> None:
    one = adapter(0)

    merged = merge([one, one, one], Soup())

    assert merged.adapter.rank == 3
    np.testing.assert_allclose(merged.adapter.products["h.0.query"].dense(), one.products["h.0.query"].dense())


def test_adapters_that_cancel_leave_one_zero_direction() -> None:
    one = adapter(0)

    merged = merge([one, one], TaskArithmetic(1.0), [1, -1])

    assert merged.adapter.rank == 1
    assert np.abs(merged.adapter.products["h.1.dense"].dense()).max() < 1e-12
    assert merged.error == 0


def test_blocks_are_numbered_by_the_names_of_layers() -> None:
    adapters = [adapter(0), adapter(1)]

    merged = merge(adapters, LiNeS(slope=0.25))

    for module, factor in (("h.0.query", 0.5), ("h.1.query", 0.75), ("h.1.dense", 0.75)):
        np.testing.assert_allclose(
            merged.adapter.products[module].dense(), factor * 2 * mean(adapters, module), atol=1e-12
        )


def test_whole_tensors_are_averaged_by_the_positive_weights() -> None:
    adapters = [adapter(0, head=[1.0, 2.0]), adapter(1, head=[5.0, 2.0]), adapter(2, head=[100.0, 100.0])]

    merged = merge(adapters, TaskArithmetic(0.3), [1, 3, -2])

    np.testing.assert_allclose(merged.adapter.whole["head"], [4.0, 2.0])


def test_a_layer_beyond_what_an_adapter_holds_is_refused() -> None:
    size = MAX_RANK + 1
    eye = FinishedAdapter({"m": Product(np.eye(size), np.eye(size))}, {})

    with pytest.raises(ConfigError, match=f"rank {size} would be needed, and {MAX_RANK} is the most"):
        merge([eye], Soup(), rank=Rank())
    assert merge([eye], Soup(), rank=Rank(7)).adapter.rank == 7


def test_adapters_that_do_not_fit_are_named() -> None:
    one = adapter(0, head=[1.0])
    with pytest.raises(SchemaError, match=r"adapter 1 has \(1,\) and adapter 2 \(2,\) at head"):
        merge([one, adapter(1, head=[1.0, 2.0])], Soup())
    less = FinishedAdapter({name: one.products[name] for name in ("h.0.query", "h.1.query")}, one.whole)
    with pytest.raises(SchemaError, match=r"adapter 3 no tensor at h\.1\.dense"):
        merge([one, one, less], Soup())


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="one finite number for each adapter"):
        merge([adapter(0), adapter(1)], Soup(), weights)


@pytest.mark.parametrize(("most", "energy"), [(0, 1.0), (None, 0.0), (None, 1.5)])
def test_a_rank_that_keeps_nothing_is_refused(most: int | None, energy: float) -> None:
    with pytest.raises(ConfigError, match="is needed"):
        Rank(most, energy)


def test_a_greedy_soup_takes_what_does_not_harm() -> None:
    """An adapter is a number here, and a soup is the better the nearer its mean comes to 1.1."""
    values, target, tried = [0.9, 0.2, 1.3, 1.0, 1.15], 1.1, list[tuple[int, ...]]()

    def score(chosen: tuple[int, ...]) -> float:
        tried.append(chosen)
        return -abs(sum(values[index] for index in chosen) / len(chosen) - target)

    soup = greedy_soup(5, score)

    # By themselves 4, 3, 2, 0 and 1 come nearest in this order. With 3 the soup is at 1.075, with 2 too it is at 1.15.
    assert tried[5:] == [(4, 3), (4, 3, 2), (4, 3, 0), (4, 3, 1)]
    assert soup.chosen == (4, 3)
    assert soup.score == pytest.approx(-0.025)
    assert soup.score >= max(soup.alone)
