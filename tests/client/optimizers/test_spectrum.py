"""Shrinkage of singular values against a dense formula in numpy, plain SGD, and the truth under the noise."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.optimizers.spectrum import SpectrumSGD
from tests.client.optimizers.stepping import RATE, Floats, drawn, ran, stepped


def shrunken(matrix: Floats, noise: float) -> Floats:
    """Gavish and Donoho in their units: noise of variance 1/n, m <= n, beta = m/n, eta(y) beyond 1 + sqrt(beta)."""
    m, n = sorted(matrix.shape)
    beta, unit = m / n, noise * math.sqrt(n)
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    y = s / unit
    eta = np.sqrt(np.maximum((y**2 - beta - 1) ** 2 - 4 * beta, 0)) / y
    return np.asarray(unit * u * np.where(y > 1 + math.sqrt(beta), eta, 0.0) @ v, np.float32)


def low_rank(shape: tuple[int, int], strengths: list[float], seed: int = 3) -> Floats:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(0, 1, (size, len(strengths))))[0] for size in shape)
    return np.asarray(u * np.array(strengths) @ v.T, np.float32)


@pytest.mark.parametrize("shape", [(60, 8), (8, 60), (10, 10)])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_steps_are_sgds_on_the_shrunken_momentum(shape: tuple[int, int], momentum: float) -> None:
    noise = 0.1
    gradients = drawn(4, shape, scale=noise) + low_rank(shape, [3.0, 1.5])
    value, velocity, summed = np.zeros(shape, np.float32), np.zeros(shape, np.float32), 0.0
    for gradient in gradients:
        velocity = np.float32(momentum) * velocity + gradient
        summed = momentum**2 * summed + 1
        value = value - np.float32(RATE) * shrunken(velocity, noise * math.sqrt(summed))

    moved = ran(SpectrumSGD(momentum=momentum), np.zeros(shape, np.float32), gradients, noise)

    assert np.linalg.norm(moved) > RATE
    np.testing.assert_allclose(moved, value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(384, 8), (8, 384), (64, 64)])
def test_the_error_to_the_truth_is_less_than_that_of_the_raw_gradient(shape: tuple[int, int]) -> None:
    """Averaged over eight draws of the noise, for a truth of rank 2 whose values are 2 and 4 times the edge."""
    noise = 0.05
    edge = noise * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    truth = low_rank(shape, [4 * edge, 2 * edge])
    start, raw, ours = np.zeros(shape, np.float32), [], []
    for seed in range(8):
        gradient = truth + drawn(1, shape, seed=seed, scale=noise)
        raw.append(np.linalg.norm(gradient[0] - truth))
        ours.append(np.linalg.norm(ran(SpectrumSGD(), start, gradient, noise) / -RATE - truth))

    assert np.mean(ours) < 0.75 * np.mean(raw)


def test_of_pure_noise_nothing_is_left() -> None:
    """Nearly: the largest singular value is beyond the edge in some draws, by little."""
    noise, shape = 0.3, (200, 50)
    gradients = drawn(20, shape, scale=noise)

    moved = [ran(SpectrumSGD(), np.zeros(shape, np.float32), each[None], noise) for each in gradients]

    assert np.mean([np.linalg.norm(each) for each in moved]) < 0.05 * RATE * noise * math.sqrt(200 * 50)
    assert sum(not each.any() for each in moved) > 10


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_noise_it_is_torchs_sgd_bit_for_bit(momentum: float) -> None:
    gradients, start = drawn(10, (7, 5)), drawn(1, (7, 5), seed=2)[0]
    value = nn.Parameter(torch.from_numpy(start.copy()))
    torchs = stepped(torch.optim.SGD([value], lr=RATE, momentum=momentum), value, gradients)

    np.testing.assert_array_equal(ran(SpectrumSGD(momentum=momentum), start, gradients), torchs)


def test_a_vector_is_shrunken_about_as_by_james_and_stein() -> None:
    """(1 - s² d / |g|²) g, which is the limit of many values."""
    noise, count = 0.1, 4000
    gradient = drawn(1, (count,), scale=noise) + np.float32(0.2)
    size = float(np.linalg.norm(gradient))

    moved = ran(SpectrumSGD(), np.zeros(count, np.float32), gradient, noise)

    np.testing.assert_allclose(moved, -RATE * (1 - noise**2 * count / size**2) * gradient[0], rtol=0.01, atol=1e-7)


def test_rows_beyond_a_clients_rank_do_not_raise_the_edge() -> None:
    """Where a client has no rank there is no noise: shrunken as if the matrix ended there."""
    noise = 0.1
    part = drawn(1, (4, 30), scale=noise) + low_rank((4, 30), [1.5])
    whole = np.concatenate([part, np.zeros((1, 12, 30), np.float32)], axis=1)

    moved = ran(SpectrumSGD(), np.zeros((16, 30), np.float32), whole, noise)

    assert moved[:4].any()
    assert not moved[4:].any()
    np.testing.assert_allclose(moved[:4], -RATE * shrunken(part[0], noise), rtol=0, atol=1e-6)


def test_the_bound_with_a_pull_is_the_sum_of_what_it_may_add() -> None:
    """X <- X + r (g + mu X), the recursion itself."""
    longest = 0.0
    for _ in range(9):
        longest += 0.5 * (2.0 + 0.3 * longest)

    assert SpectrumSGD().longest_move(9, 0.5, 2.0, 1, 0.3) == pytest.approx(longest)
    assert SpectrumSGD(momentum=0.5).longest_move(9, 0.5, 2.0, 1, 0.0) == pytest.approx(9 * 0.5 * 2.0 / 0.5)
    assert SpectrumSGD().longest_move(10_000, 1.0, 1.0, 1, 10.0) == math.inf
