"""Muon's steps against numpy's singular value decomposition and torch's Muon."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.optimizers.muon import Muon
from tests.client.optimizers.stepping import RATE, Floats, drawn, ran, stepped


def orthogonalised(matrix: Floats) -> Floats:
    u, _, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return np.asarray(0.2 * math.sqrt(max(matrix.shape)) * u @ v, np.float32)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (6, 6)])
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_steps_are_the_orthogonalised_nesterov_momentum(shape: tuple[int, int], momentum: float) -> None:
    gradients = drawn(5, shape)
    value, velocity = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for gradient in gradients:
        velocity = momentum * velocity + gradient
        value = value - RATE * orthogonalised(gradient + momentum * velocity)

    np.testing.assert_allclose(
        ran(Muon(momentum=momentum), np.zeros(shape, np.float32), gradients), value, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_singular_values_of_a_step_are_equal_and_its_size_is_adams(shape: tuple[int, int]) -> None:
    """Of a gradient whose own singular values are a thousand times apart."""
    gradient = drawn(1, shape)[0] @ np.diag(np.logspace(0, 3, shape[1])).astype(np.float32)

    moved = ran(Muon(), np.zeros(shape, np.float32), gradient[None])

    values = np.linalg.svd(moved.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(values, RATE * 0.2 * math.sqrt(40), rtol=1e-4)
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(0.2 * RATE, rel=1e-4)


def test_directions_and_size_are_torchs() -> None:
    """Torch's Newton-Schulz iteration in bfloat16 leaves singular values of 0.5 to 1.5, along the same vectors."""
    gradients = drawn(1, (40, 8))
    value = nn.Parameter(torch.zeros(40, 8))
    torchs = torch.optim.Muon(
        [value], lr=RATE, weight_decay=0.0, momentum=0.5, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )

    theirs = stepped(torchs, value, gradients)
    ours = ran(Muon(momentum=0.5), np.zeros((40, 8), np.float32), gradients)

    assert np.sum(ours * theirs) > 0.95 * np.linalg.norm(ours) * np.linalg.norm(theirs)
    assert np.linalg.norm(theirs) == pytest.approx(np.linalg.norm(ours), rel=0.3)


@pytest.mark.parametrize("shape", [(16,), ()])
def test_what_is_no_matrix_takes_steps_of_one_length(shape: tuple[int, ...]) -> None:
    """SGD with momentum, the gradient brought to a root mean square of 0.2."""
    gradients = drawn(3, shape)
    value, velocity = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for gradient in gradients:
        velocity = 0.5 * velocity + gradient
        direction = gradient + 0.5 * velocity
        value = value - RATE * 0.2 * math.sqrt(direction.size) * direction / np.linalg.norm(direction)

    np.testing.assert_allclose(
        ran(Muon(momentum=0.5), np.zeros(shape, np.float32), gradients), value, rtol=1e-4, atol=1e-7
    )


def test_directions_without_gradient_do_not_move() -> None:
    """A gradient of rank 2 makes a step of rank 2, and rows of zeros stay where they are."""
    gradient = np.zeros((12, 6), np.float32)
    gradient[:8] = drawn(1, (8, 2))[0] @ drawn(1, (2, 6), seed=2)[0]

    moved = ran(Muon(), np.zeros((12, 6), np.float32), gradient[None])

    values = np.linalg.svd(moved.astype(np.float64), compute_uv=False)
    assert not moved[8:].any()
    assert np.sum(values > 1e-3 * values[0]) == 2
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_the_bound_is_met_by_a_round_whose_gradients_agree() -> None:
    """A matrix of full rank and a vector move by exactly 0.2 r sqrt(d) in each step."""
    gradients = np.repeat(drawn(1, (40, 8)), 7, axis=0)

    moved = ran(Muon(momentum=0.9), np.zeros((40, 8), np.float32), gradients)

    assert np.linalg.norm(moved) == pytest.approx(Muon().longest_move(7, RATE, 1.0, 320, 0.0), rel=1e-4)


def test_a_gradient_that_is_not_finite_makes_the_value_not_finite() -> None:
    """So that the update is refused and not sent as if nothing had been."""
    gradient = drawn(1, (4, 3))
    gradient[0, 1, 2] = np.inf

    assert not np.isfinite(ran(Muon(), np.zeros((4, 3), np.float32), gradient)).all()
