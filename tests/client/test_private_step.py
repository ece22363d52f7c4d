"""What one private step promises: bounded sensitivity, exact noise, no failure on odd batches."""

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.privacy.entropy import Entropy, Seeded, System
from fedloom.client.privacy.optimizer import PrivateOptimizer
from fedloom.client.privacy.per_example import recording


class Silence:
    """No noise, to look at the sum alone."""

    def uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.zeros(count)

    def normal(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.zeros(count)


def step(x: torch.Tensor, entropy: Entropy, *, sigma: float = 1.0, clip: float = 0.5, width: int = 4) -> torch.Tensor:
    """The gradient one private step hands to SGD for a linear layer under a quadratic loss, times the divisor."""
    layer = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, width))
    parameters = list(layer.parameters())
    with recording(layer, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            tape,
            entropy,
            noise_multiplier=sigma,
            clip_norm=clip,
            expected_batch=10,
        )
        if len(x):
            tape.begin(len(x))
            torch.autograd.backward(layer(x).square().sum())
            optimizer.accumulate()
        optimizer.release()
        assert layer.weight.grad is not None
        return layer.weight.grad.reshape(-1) * 10


@pytest.mark.parametrize("extra", [1e-3, 1.0, 1e6, float("inf"), float("nan")])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(extra: float) -> None:
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    added = torch.cat([data, torch.full((1, 4), extra)])

    distance = (step(added, Silence()) - step(data, Silence())).norm()

    assert torch.isfinite(distance)
    assert distance <= 0.5 * (1 + 1e-5)


def test_a_non_finite_example_counts_as_zero() -> None:
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    assert torch.equal(step(torch.cat([data, torch.full((1, 4), float("nan"))]), Silence()), step(data, Silence()))


def test_empty_batch_is_a_step_of_pure_noise() -> None:
    noisy = step(torch.zeros(0, 4), Seeded(5), sigma=2.0, clip=0.5)

    np.testing.assert_allclose(noisy.numpy(), Seeded(5).normal(4) * (2.0 * 0.5), rtol=1e-5)


def test_noise_has_the_promised_spread() -> None:
    drawn = step(torch.zeros(0, 40_000), System(), sigma=1.5, clip=2.0, width=40_000).numpy()

    # Standard error of a standard deviation is sd / sqrt(2n) = 0.0106; five of them.
    assert abs(drawn.std() - 3.0) < 0.053
    assert abs(drawn.mean()) < 5 * 3.0 / np.sqrt(40_000)


def test_system_noise_is_normal_and_not_repeated() -> None:
    draws = np.sort(System().normal(50_000))
    from scipy.stats import kstest

    assert kstest(draws, "norm").pvalue > 1e-6
    assert len(np.unique(draws)) == 50_000


def test_system_entropy_ignores_every_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = System().normal(8)
    torch.manual_seed(0)
    np.random.seed(0)

    assert not np.array_equal(first, System().normal(8))


def test_system_uniform_lies_in_the_half_open_interval() -> None:
    values = System().uniform(100_001)

    assert values.shape == (100_001,)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * 100_001)


def test_opacus_step_is_refused() -> None:
    layer = nn.Linear(2, 1)
    parameters = list(layer.parameters())
    with recording(layer, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.1), tape, Seeded(1), noise_multiplier=1, clip_norm=1, expected_batch=4
        )
        with pytest.raises(NotImplementedError, match="release"):
            optimizer.step()
