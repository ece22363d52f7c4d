"""GaLore against its algorithm in numpy, and against Adam where the two are one."""

import numpy as np
import pytest
import torch

from fedloom.client.optimizers.adam import Adam
from fedloom.client.optimizers.galore import GaLore
from tests.client.optimizers.stepping import RATE, Floats, drawn, ran


def by_hand(gradients: Floats, rank: int, period: int, scale: float) -> Floats:
    """Algorithm 2 of the paper in float64, for gradients that are no taller than wide."""
    shape = gradients.shape[1:]
    value = np.zeros(shape)
    mean = square = np.zeros((rank, shape[1]))
    for step, gradient in enumerate(gradients.astype(np.float64)):
        if step % period == 0:
            chosen = np.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
            # A singular vector's sign is a library's to choose, and moments that outlive a choice depend on it.
            theirs = torch.linalg.svd(torch.from_numpy(gradients[step]), full_matrices=False)[0][:, :rank].numpy()
            chosen = chosen * np.sign(np.sum(chosen * theirs, 0))
        projected = chosen.T @ gradient
        mean = 0.9 * mean + 0.1 * projected
        square = 0.999 * square + 0.001 * projected**2
        first, second = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        value -= scale * RATE * chosen @ (first / (np.sqrt(second) + 1e-8))
    return value.astype(np.float32)


@pytest.mark.parametrize("period", [3, 200])
@pytest.mark.parametrize("tall", [False, True])
def test_steps_are_the_papers(period: int, tall: bool) -> None:
    gradients = drawn(8, (6, 30))
    expected = by_hand(gradients, 2, period, 0.25)
    given = np.ascontiguousarray(gradients.transpose(0, 2, 1)) if tall else gradients

    found = ran(GaLore(projection_rank=2, period=period), np.zeros(given.shape[1:], np.float32), given)

    np.testing.assert_allclose(found.T if tall else found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tall", [False, True])
def test_two_sided_steps_are_adam_between_both_projections(tall: bool) -> None:
    """GradNormLoRP. Each coordinate of the projection moves alone, so any signs of the vectors give the same."""
    gradients = drawn(7, (6, 30))
    left, _, right = np.linalg.svd(gradients[0].astype(np.float64), full_matrices=False)
    p, q = left[:, :2], right[:2].T
    mean, square, value = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((6, 30))
    for step, gradient in enumerate(gradients.astype(np.float64)):
        projected = p.T @ gradient @ q
        mean, square = 0.9 * mean + 0.1 * projected, 0.999 * square + 0.001 * projected**2
        first, second = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        value -= 0.25 * RATE * p @ (first / (np.sqrt(second) + 1e-8)) @ q.T
    given = np.ascontiguousarray(gradients.transpose(0, 2, 1)) if tall else gradients

    found = ran(GaLore(projection_rank=2, two_sided=True), np.zeros(given.shape[1:], np.float32), given)

    np.testing.assert_allclose(found.T if tall else found, value, rtol=0, atol=1e-5)


def test_a_round_moves_in_the_directions_of_its_first_gradient_alone() -> None:
    gradients = drawn(5, (8, 40))
    outside = np.linalg.svd(gradients[0].astype(np.float64))[0][:, 3:]

    moved = ran(GaLore(projection_rank=3), np.zeros((8, 40), np.float32), gradients)

    assert np.linalg.norm(moved) > 5 * 0.25 * RATE
    assert np.abs(outside.T @ moved).max() < 1e-6
    assert np.linalg.matrix_rank(moved, tol=1e-5) == 3


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (12,)])
def test_what_has_no_more_directions_than_the_projection_takes_adams_steps(shape: tuple[int, ...]) -> None:
    gradients, start = drawn(6, shape), drawn(1, shape, seed=2)[0]

    found = ran(GaLore(projection_rank=3, scale=1.0), start, gradients)

    np.testing.assert_array_equal(found, ran(Adam(), start, gradients))


def test_directions_that_a_gradient_lacks_do_not_move() -> None:
    """A gradient of rank 1 with rows of zeros: what rounding leaves in other directions is not divided by itself."""
    gradient = np.zeros((8, 40), np.float32)
    gradient[:5] = np.outer(np.arange(1, 6), drawn(1, (40,))[0])
    gradients = np.repeat(gradient[None], 4, axis=0)

    moved = ran(GaLore(projection_rank=4), np.zeros((8, 40), np.float32), gradients)

    assert not moved[5:].any()
    assert np.linalg.matrix_rank(moved, tol=1e-5) == 1


def test_a_gradient_that_is_not_finite_makes_the_value_not_finite() -> None:
    gradient = drawn(1, (8, 9))
    gradient[0, 1, 2] = np.nan

    assert not np.isfinite(ran(GaLore(), np.zeros((8, 9), np.float32), gradient)).all()
