"""Every method of merging against its formula in dense numpy."""

import numpy as np
import numpy.typing as npt
import pytest

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.adapter import Product, weighted_sum
from fedloom.strategies.merging.methods.api import Method, Place
from fedloom.strategies.merging.methods.breadcrumbs import Breadcrumbs
from fedloom.strategies.merging.methods.dare import Dare
from fedloom.strategies.merging.methods.lines import LiNeS
from fedloom.strategies.merging.methods.named import METHODS, method_named
from fedloom.strategies.merging.methods.soup import Soup
from fedloom.strategies.merging.methods.task_arithmetic import TaskArithmetic
from fedloom.strategies.merging.methods.ties import Ties

Float64 = npt.NDArray[np.float64]
FIRST = Place(0, 0.0)
OPTIONS: dict[str, dict[str, float]] = {"lines": {"slope": 0.5}, "ties": {"density": 0.4}}


def drawn(*ranks: int, out: int = 11, inner: int = 7, seed: int = 0) -> list[Product]:
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return [Product(draw.normal(size=(out, rank)), draw.normal(size=(rank, inner))) for rank in ranks]


def row(*values: float) -> Product:
    """A product that is this one row."""
    return Product(np.ones((1, 1)), np.array([values]))


def dense(update: Product | Float64) -> Float64:
    return update.dense() if isinstance(update, Product) else update


def test_a_soup_is_the_mean_of_the_products_and_not_of_the_factors() -> None:
    one, two = drawn(3, 3)

    merged = Soup().merge([one, two], [1, 3], FIRST)

    expected = 0.25 * (one.b @ one.a) + 0.75 * (two.b @ two.a)
    np.testing.assert_allclose(merged.dense(), expected, atol=1e-13)
    factors = (0.25 * one.b + 0.75 * two.b) @ (0.25 * one.a + 0.75 * two.a)
    assert np.abs(expected - factors).max() > 0.1


def test_ranks_may_differ_and_add_up() -> None:
    products = drawn(1, 4, 2)

    merged = Soup().merge(products, [1, 1, 1], FIRST)

    assert merged.rank == 7
    np.testing.assert_allclose(merged.dense(), sum(each.b @ each.a for each in products) / 3, atol=1e-13)
    assert merged.norm == pytest.approx(np.linalg.norm(merged.b @ merged.a), rel=1e-12)


def test_task_arithmetic_adds_and_takes_away() -> None:
    one, two = drawn(2, 3)

    merged = TaskArithmetic(0.3).merge([one, two], [1, -2], FIRST)

    np.testing.assert_allclose(merged.dense(), 0.3 * (one.b @ one.a - 2 * two.b @ two.a), atol=1e-13)


def test_ties_by_hand() -> None:
    """Two rows of four, half of each kept: [3, 0, 0, 2] and [-2, -4, 0, 0], whose sum elects + - + +."""
    products = [row(3, -1, 0.5, 2), row(-2, -4, 1, 1)]

    merged = Ties(density=0.5).merge(products, [1, 1], FIRST)

    np.testing.assert_array_equal(merged, [[3, -4, 0, 2]])
    # With five times the weight the second row elects its own sign, and where both agree counts five times.
    heavy = Ties(density=1.0, scaling=2.0).merge(products, [1, 5], FIRST)
    np.testing.assert_allclose(heavy, [[-4, 2 * -21 / 6, 2 * 5.5 / 6, 2 * 7 / 6]])


def test_ties_against_a_loop_over_entries() -> None:
    products, shares = drawn(3, 2, 3, 4, seed=1), [0.1, 0.2, 0.3, 0.4]
    kept = int(0.35 * 77)
    trimmed = []
    for each in products:
        values = (each.b @ each.a).ravel()
        threshold = sorted(abs(values))[-kept]
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in values])
    expected = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(p * t for p, t in zip(shares, entries, strict=True)) >= 0 else -1
        agreeing = [(p, t) for p, t in zip(shares, entries, strict=True) if t * sign > 0]
        expected.append(sum(p * t for p, t in agreeing) / sum(p for p, _ in agreeing) if agreeing else 0.0)

    merged = Ties(density=0.35).merge(products, [1, 2, 3, 4], FIRST)

    np.testing.assert_allclose(merged.ravel(), expected, atol=1e-13)
    assert 0 < np.count_nonzero(merged) < 77


def test_dare_drops_and_rescales() -> None:
    (product,) = drawn(3, out=60, inner=50, seed=2)
    method = Dare(density=0.25, scaling=0.5, seed=4)

    merged = method.merge([product], [3], FIRST)

    full = 0.5 * 3 * (product.b @ product.a) / 0.25
    kept = merged != 0
    np.testing.assert_allclose(merged[kept], full[kept], rtol=1e-12)
    assert abs(kept.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 3000)
    np.testing.assert_array_equal(method.merge([product], [3], FIRST), merged)


def test_dare_is_task_arithmetic_in_the_mean() -> None:
    products, count = drawn(2, 2, out=4, inner=3, seed=3), 4000

    mean = sum(Dare(0.5, 1.0, seed).merge(products, [1, 2], FIRST) for seed in range(count)) / count

    exact = TaskArithmetic(1.0).merge(products, [1, 2], FIRST).dense()
    # The variance of an entry kept with probability 1/2 and doubled is its square.
    deviation = np.sqrt(sum((w * (p.b @ p.a)) ** 2 for w, p in zip((1, 2), products, strict=True)) / count)
    assert (np.abs(mean - exact) < 5 * deviation).all()


def test_dare_drops_other_entries_of_every_adapter_and_layer() -> None:
    method, shape = Dare(density=0.5), (40, 40)
    masks = [method.mask(shape, Place(layer, 0.0), adapter) for layer in (0, 1) for adapter in (0, 1)]
    masks.append(Dare(density=0.5, seed=1).mask(shape, FIRST, 0))

    for index, one in enumerate(masks):
        for two in masks[index + 1 :]:
            assert abs((one == two).mean() - 0.5) < 5 * 0.5 / 40


def test_breadcrumbs_by_hand() -> None:
    values = [9.0, -8, 7, -6, 5, -4, 3, -2, 1, 0.5]

    merged = Breadcrumbs(smallest=0.3, largest=0.2, scaling=2.0).merge([row(*values)], [1], FIRST)

    np.testing.assert_array_equal(merged, [[0, 0, 14, -12, 10, -8, 6, 0, 0, 0]])


def test_breadcrumbs_masks_each_product_by_itself() -> None:
    products, weights = drawn(2, 3, seed=5), (1.0, -0.5)
    expected = np.zeros((11, 7))
    for each, weight in zip(products, weights, strict=True):
        values = each.b @ each.a
        order = np.argsort(np.abs(values).ravel())
        mask = np.ones(77)
        mask[order[: int(0.6 * 77)]] = 0
        mask[order[77 - int(0.1 * 77) :]] = 0
        expected += 0.4 * weight * values * mask.reshape(11, 7)

    merged = Breadcrumbs(0.6, 0.1).merge(products, weights, FIRST)

    np.testing.assert_allclose(merged, expected, atol=1e-13)


@pytest.mark.parametrize(("depth", "factor"), [(0.0, 1 / 2), (0.25, 1 / 2 + 0.2), (1.0, 1 / 2 + 0.8)])
def test_lines_adds_more_in_deep_blocks(depth: float, factor: float) -> None:
    one, two = drawn(2, 2, seed=6)

    merged = LiNeS(slope=0.8).merge([one, two], [1, 1], Place(3, depth))

    np.testing.assert_allclose(merged.dense(), factor * (one.b @ one.a + two.b @ two.a), atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_looks_at_the_factors(name: str) -> None:
    """(B G^-1, G A) is the same adapter as (B, A)."""
    method: Method = method_named(name, OPTIONS.get(name, {}))
    products = drawn(3, 3, seed=7)
    gauge = np.array([[2.0, 0.5, 0.0], [0.0, -1.0, 1.0], [0.3, 0.0, 0.5]])
    turned = [Product(each.b @ np.linalg.inv(gauge), gauge @ each.a) for each in products]

    one, two = (dense(method.merge(each, [1, 1], Place(2, 0.5))) for each in (products, turned))

    np.testing.assert_allclose(two, one, atol=1e-12)
    assert np.abs(one).max() > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("task-arithmetic", {"scaling": 0.5}),
        ("lines", {"slope": 0.0}),
        ("dare", {"density": 1.0, "scaling": 0.5}),
        ("breadcrumbs", {"smallest": 0.0, "largest": 0.0, "scaling": 0.5}),
    ],
)
def test_where_nothing_is_left_out_a_method_is_the_soup(name: str, options: dict[str, float]) -> None:
    products = drawn(2, 4, seed=8)

    merged = method_named(name, options).merge(products, [1, 1], Place(0, 1.0))

    np.testing.assert_allclose(dense(merged), Soup().merge(products, [1, 1], FIRST).dense(), atol=1e-13)


def test_a_sum_is_exact_at_the_sum_of_the_ranks() -> None:
    one, two = drawn(2, 3)

    stacked = weighted_sum([one, two], [0.5, -3])

    assert (stacked.b.shape, stacked.a.shape) == ((11, 5), (5, 7))
    np.testing.assert_allclose(stacked.b @ stacked.a, 0.5 * one.b @ one.a - 3 * two.b @ two.a, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("stew", {}, "available: soup, task-arithmetic"),
        ("soup", {"density": 0.5}, "soup takes no density .*: ties, dare"),
        ("lines", {}, "lines needs a value for 'slope'; give --slope"),
        ("lines", {"slope": -1.0}, "slope is -1"),
        ("ties", {"density": 0.0}, "density is 0;"),
        ("dare", {"density": 1.5}, "density is 1.5;"),
        ("dare", {"seed": -1}, "seed is -1;"),
        ("task-arithmetic", {"scaling": float("inf")}, "scaling is inf"),
        ("breadcrumbs", {"smallest": 0.7, "largest": 0.3}, "smallest is 0.7 and largest 0.3"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_named(name, options)


@pytest.mark.parametrize("method", [Soup(), Ties()])
@pytest.mark.parametrize("weights", [[1, -1], [0, 0]])
def test_a_mean_needs_weights_that_have_one(method: Method, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="have no mean"):
        method.merge(drawn(2, 2), weights, FIRST)
