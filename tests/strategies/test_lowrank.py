"""The refactorisation against its definition and against a dense SVD."""

import numpy as np
import pytest

from fedloom.core.errors import SchemaError, UpdateRejected
from fedloom.core.schema import Array
from fedloom.strategies.lowrank import orthonormal_rows, refactorize


def _factors(out: int, rank: int, inner: int, seed: int = 0) -> tuple[Array, Array]:
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    return draw.normal(size=(out, rank)), draw.normal(size=(rank, inner))


SHAPES = [(24, 4, 17), (4, 4, 9), (9, 4, 4), (3, 1, 2), (40, 16, 30)]


@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_kept_and_rows_are_orthonormal(shape: tuple[int, int, int]) -> None:
    b, a = _factors(*shape)

    new_b, new_a = refactorize(b, a)

    assert new_b.shape == b.shape
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-12)
    np.testing.assert_allclose(new_a @ new_a.T, np.eye(len(a)), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_dense_svd(shape: tuple[int, int, int]) -> None:
    b, a = _factors(*shape, seed=1)
    u, sigma, vt = np.linalg.svd(b @ a)
    rank = shape[1]

    new_b, new_a = refactorize(b, a)

    norms = np.linalg.norm(new_b, axis=0)
    np.testing.assert_allclose(norms, sigma[:rank], rtol=1e-10)
    assert (np.diff(norms) <= 0).all()
    signs = np.sign(np.sum(new_a * vt[:rank], axis=1))
    np.testing.assert_allclose(new_a, signs[:, None] * vt[:rank], atol=1e-10)
    np.testing.assert_allclose(new_b, signs * u[:, :rank] * sigma[:rank], atol=1e-10)


def test_row_space_stays_over_many_noisy_rounds() -> None:
    b, a = _factors(20, 4, 15, seed=2)
    projector = np.linalg.pinv(a) @ a
    draw = np.random.Generator(np.random.Philox(key=[2, 1]))
    for _ in range(12):
        b, a = refactorize(b + draw.normal(size=b.shape), a)

        np.testing.assert_allclose(a.T @ a, projector, atol=1e-12)


def test_zero_b_keeps_the_directions_of_a_in_order() -> None:
    _, a = _factors(6, 3, 8, seed=3)

    new_b, new_a = refactorize(np.zeros((6, 3)), a)

    np.testing.assert_array_equal(new_b, 0)
    # Gram-Schmidt in order: row i of the old A is a combination of the first i + 1 new rows.
    np.testing.assert_allclose(np.triu(a @ new_a.T, 1), 0, atol=1e-12)
    np.testing.assert_allclose(a @ new_a.T @ new_a, a, atol=1e-12)


def test_zero_b_leaves_an_orthonormal_a_as_it_is() -> None:
    a = orthonormal_rows(_factors(6, 3, 8, seed=3)[1])

    new_b, new_a = refactorize(np.zeros((6, 3)), a)

    np.testing.assert_array_equal(new_b, 0)
    np.testing.assert_allclose(new_a, a, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_directions_without_a_singular_value_come_from_the_old_a(kept: int) -> None:
    b, a = _factors(10, 4, 12, seed=4)
    b[:, kept:] = b[:, :1]  # rank of b is now `kept`

    new_b, new_a = refactorize(b, a)

    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-12)
    np.testing.assert_allclose(new_a @ new_a.T, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(a @ new_a.T @ new_a, a, atol=1e-12)
    np.testing.assert_allclose(new_b[:, kept:], 0, atol=1e-12)


@pytest.mark.parametrize(("out", "rank", "inner"), [(2, 4, 9), (9, 4, 2), (2, 4, 3), (1, 3, 1)])
def test_rank_beyond_a_width_gives_no_nan(out: int, rank: int, inner: int) -> None:
    b, a = _factors(out, rank, inner, seed=5)

    new_b, new_a = refactorize(b, a)

    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-12)
    effective = min(rank, inner)
    np.testing.assert_allclose(new_a[:effective] @ new_a[:effective].T, np.eye(effective), atol=1e-12)
    np.testing.assert_array_equal(new_a[effective:], 0)


def test_dependent_rows_and_both_factors_zero_stay_finite() -> None:
    b, a = _factors(6, 3, 8, seed=6)
    a[2] = a[0] + a[1]

    for factors in ((b, a), (b, np.zeros_like(a)), (np.zeros_like(b), np.zeros_like(a))):
        new_b, new_a = refactorize(*factors)

        np.testing.assert_allclose(new_b @ new_a, factors[0] @ factors[1], atol=1e-12)
        np.testing.assert_allclose(new_a @ new_a.T, np.eye(3), atol=1e-12)


def test_signs_do_not_depend_on_the_gauge() -> None:
    """The same product written with other factors gives the same rows: the sign is a rule, not an accident."""
    b, a = _factors(11, 3, 7, seed=7)
    gauge = np.array([[-1.0, 0.5, 0.0], [0.0, -2.0, 1.0], [0.3, 0.0, 1.0]])

    first = refactorize(b, a)
    second = refactorize(b @ np.linalg.inv(gauge), gauge @ a)

    np.testing.assert_allclose(second[1], first[1], atol=1e-10)
    np.testing.assert_allclose(second[0], first[0], atol=1e-10)
    peak = np.argmax(np.abs(first[1]), axis=1)
    assert (first[1][np.arange(3), peak] > 0).all()


def test_orthonormal_rows_spans_the_same_space() -> None:
    _, a = _factors(1, 5, 20, seed=8)

    basis = orthonormal_rows(a)

    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(a @ basis.T @ basis, a, atol=1e-12)


def test_what_has_no_product_is_refused() -> None:
    b, a = _factors(4, 2, 5)
    with pytest.raises(SchemaError, match=r"\(4, 2\) and \(3, 5\)"):
        refactorize(b, np.zeros((3, 5)))
    with pytest.raises(SchemaError, match="no rows"):
        orthonormal_rows(np.zeros(3))
    a[0, 0] = np.nan
    with pytest.raises(UpdateRejected, match="NaN"):
        refactorize(b, a)
