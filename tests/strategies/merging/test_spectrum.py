"""Spectra and likenesses from factors against the dense SVD and projectors."""

import numpy as np
import pytest

from fedloom.core.errors import SchemaError
from fedloom.strategies.merging.adapter import Product
from fedloom.strategies.merging.spectrum import likeness, spectrum


def product(seed: int, rank: int = 3, out: int = 12, inner: int = 9) -> Product:
    draw = np.random.Generator(np.random.Philox(key=[seed, 2]))
    return Product(draw.normal(size=(out, rank)), draw.normal(size=(rank, inner)))


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_singular_values_are_those_of_the_dense_matrix(rank: int) -> None:
    one = product(0, rank)
    sigma = np.linalg.svd(one.b @ one.a, compute_uv=False)[:rank]

    found = spectrum(one)

    np.testing.assert_allclose(found.values, sigma, rtol=1e-10)
    assert found.norm == pytest.approx(np.linalg.norm(one.b @ one.a), rel=1e-12)
    parts = sigma / sigma.sum()
    assert found.effective_rank == pytest.approx(np.prod(parts**-parts), rel=1e-10)


def test_effective_rank_counts_directions_that_matter() -> None:
    equal, single = Product(np.eye(6)[:, :4], np.eye(5)[:4]), product(1, 1)
    doubled = Product(np.tile(single.b, 3), np.tile(single.a, (3, 1)))

    assert spectrum(equal).effective_rank == pytest.approx(4)
    assert (len(spectrum(doubled).values), spectrum(doubled).rank) == (1, 3)
    assert spectrum(doubled).effective_rank == pytest.approx(1)


def test_a_zero_product_has_no_direction() -> None:
    zero = Product(np.zeros((12, 3)), product(0).a)
    found = spectrum(zero)

    assert (found.values, found.norm, found.effective_rank) == ((), 0.0, 0.0)
    alike = likeness(zero, product(0))
    assert (alike.cosine, alike.inputs, alike.outputs) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5)])
def test_likeness_is_that_of_dense_matrices_and_projectors(ranks: tuple[int, int]) -> None:
    one, two = product(2, ranks[0]), product(3, ranks[1])
    dense = [each.b @ each.a for each in (one, two)]

    alike = likeness(one, two)

    cosine = np.sum(dense[0] * dense[1]) / (np.linalg.norm(dense[0]) * np.linalg.norm(dense[1]))
    assert alike.cosine == pytest.approx(cosine, rel=1e-9)
    rows = [np.linalg.pinv(each) @ each for each in dense]
    columns = [each @ np.linalg.pinv(each) for each in dense]
    assert alike.inputs == pytest.approx(np.sum((rows[0] @ rows[1]) ** 2) / min(ranks), rel=1e-9)
    assert alike.outputs == pytest.approx(np.sum((columns[0] @ columns[1]) ** 2) / min(ranks), rel=1e-9)


def test_an_adapter_is_like_itself_in_any_factors_and_unlike_what_is_orthogonal() -> None:
    one = product(4)
    gauge = np.array([[2.0, 0.5, 0.0], [0.0, -1.0, 1.0], [0.3, 0.0, 0.5]])

    turned = likeness(one, Product(-one.b @ np.linalg.inv(gauge), gauge @ one.a))
    apart = likeness(Product(np.eye(6)[:, :2], np.eye(5)[:2]), Product(np.eye(6)[:, :2], np.eye(5)[2:4]))

    assert (turned.cosine, turned.inputs, turned.outputs) == pytest.approx((-1, 1, 1), abs=1e-12)
    assert (apart.cosine, apart.inputs, apart.outputs) == (0.0, 0.0, 1.0)


def test_random_spaces_overlap_as_said() -> None:
    draws = [likeness(product(2 * k, 4, 60, 50), product(2 * k + 1, 4, 60, 50)) for k in range(100)]

    assert np.mean([each.inputs for each in draws]) == pytest.approx(4 / 50, rel=0.1)
    assert np.mean([each.outputs for each in draws]) == pytest.approx(4 / 60, rel=0.1)


def test_layers_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(SchemaError, match=r"\(12, 9\) and \(12, 8\)"):
        likeness(product(0), product(1, inner=8))
