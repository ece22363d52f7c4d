"""LA-LoRA's filter against a dense matrix, and what it does to noise and to the length of a round."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedloom.client.optimizers.low_pass import low_pass
from fedloom.client.optimizers.sgd import SGD
from tests.client.optimizers.stepping import RATE, Floats, drawn, ran

TAPS = np.array([1, 4, 6, 4, 1]) / 16


def circulant(size: int) -> npt.NDArray[np.float64]:
    """The filter as a matrix."""
    matrix = np.zeros((size, size))
    for row in range(size):
        for distance, tap in zip(range(-2, 3), TAPS, strict=True):
            matrix[row, (row + distance) % size] += tap
    return matrix


@pytest.mark.parametrize("shape", [(3, 7), (9, 4), (6,), (1, 2), (5, 5), (2, 3, 8)])
def test_it_is_a_dense_matrix_along_the_longest_axis(shape: tuple[int, ...]) -> None:
    values = drawn(1, shape)[0]
    axis = int(np.argmax(shape))
    expected = np.moveaxis(np.tensordot(circulant(shape[axis]), values.astype(np.float64), (1, axis)), 0, axis)

    found = low_pass(torch.from_numpy(values))

    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 17, 384])
def test_nothing_gets_longer_and_the_mean_stays(size: int) -> None:
    """Its eigenvalues are cos^4(pi k / n): so the bound on the length of an update holds, with any pull."""
    found = low_pass(torch.eye(size, dtype=torch.float64)[:, :, None].expand(size, size, 1)[..., 0]).numpy()
    columns = np.stack([low_pass(torch.from_numpy(row)).numpy() for row in np.eye(size)])

    np.testing.assert_allclose(found, circulant(size), atol=1e-12)
    np.testing.assert_allclose(columns, circulant(size), atol=1e-12)
    eigenvalues = np.sort(np.linalg.eigvalsh(circulant(size)))
    np.testing.assert_allclose(eigenvalues, np.sort(np.cos(np.pi * np.arange(size) / size) ** 4), atol=1e-12)
    np.testing.assert_allclose(circulant(size).sum(0), 1)


def test_of_noise_70_of_256_is_left_and_a_constant_stays() -> None:
    noise = drawn(1, (40, 5000), seed=4)[0]

    left = low_pass(torch.from_numpy(noise)).numpy()

    assert np.var(left) == pytest.approx(70 / 256, rel=0.02)
    np.testing.assert_allclose(low_pass(torch.full((3, 11), 2.0)).numpy(), 2.0, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_sees_filtered_gradients(momentum: float) -> None:
    start, gradients = drawn(1, (4, 9), seed=2)[0], drawn(12, (4, 9))
    filtered = (gradients.astype(np.float64) @ circulant(9)).astype(np.float32)

    found = ran(SGD(momentum=momentum, smoothing=True), start, gradients)

    np.testing.assert_allclose(found, ran(SGD(momentum=momentum), start, filtered), atol=1e-6)
    assert np.abs(found - ran(SGD(momentum=momentum), start, gradients)).max() > RATE


def test_what_rests_stays_at_rest() -> None:
    one, other = (torch.nn.Parameter(torch.zeros(6)) for _ in range(2))
    made = SGD(smoothing=True).make([{"params": [one, other], "lr": 1.0}], 0.0)
    one.grad = torch.ones(6)

    made.step()

    assert one.detach().tolist() == pytest.approx([-1.0] * 6)
    assert not other.detach().any()
    assert other.grad is None


def test_what_noise_moves_is_that_of_many_draws() -> None:
    """Momentum 0.9, ten steps, 40,000 values: the standard error is 0.4 %."""
    noise = drawn(10, (40_000,), seed=6, scale=0.3)

    moved: Floats = ran(SGD(momentum=0.9), np.zeros(40_000, np.float32), noise)

    claimed = SGD(momentum=0.9).noise_moved(10, RATE, 0.3)
    assert claimed is not None
    assert float(np.std(moved)) == pytest.approx(claimed, rel=0.015)
    assert SGD().noise_moved(9, 0.5, 2.0) == pytest.approx(3.0)
    assert SGD(smoothing=True).noise_moved(9, 0.5, 2.0) is None
