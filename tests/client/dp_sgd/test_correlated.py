"""A step with noise bands: what it releases against dense matrices, and how far one example moves it."""

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.privacy.dp_sgd.correlated import Correlated
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded, drawn_groups
from fedloom.core.privacy.banded import Banded, Floats
from fedloom.core.privacy.gaussian import UNITS, deviation, longest

SIGMA, CLIP = 1.5, 0.7


def releases(strategy: Banded | None, entropy: Entropy, width: int, examples: list[torch.Tensor], steps: int) -> Floats:
    """What the steps of a round hand to SGD, shape (steps, width); step t is over `examples[t]`, if there is one."""
    parameter = nn.Parameter(torch.zeros(width))
    base, tape = torch.optim.SGD([parameter], lr=0.0), Tape([parameter])
    optimizer = PrivateOptimizer(
        base, tape, entropy, noise_multiplier=SIGMA, clip_norm=CLIP, expected_batch=1.0, strategy=strategy
    )
    found = np.empty((steps, width))
    for step in range(steps):
        if step < len(examples):
            tape.begin(len(examples[step]))
            tape.add(parameter, examples[step].clone())
            optimizer.accumulate()
        optimizer.release()
        assert parameter.grad is not None
        found[step] = parameter.grad.numpy()
    return found


@pytest.mark.parametrize(("steps", "bands", "momentum"), [(6, 2, 0.0), (7, 4, 0.5), (5, 5, 0.0), (9, 3, 0.9)])
def test_releases_are_sums_and_noise_through_the_inverse(steps: int, bands: int, momentum: float) -> None:
    strategy, width = Banded(steps, bands, momentum), 50
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randn(3, width, generator=generator) for _ in range(steps)]
    clipped = np.stack([(each * (CLIP / each.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0) for each in examples])
    source, scale = Seeded(3), CLIP / longest(width, bands)
    noise = np.stack([source.normal(deviation(SIGMA), width) for _ in range(steps)]) * scale

    found = releases(strategy, Seeded(3), width, examples, steps)

    np.testing.assert_allclose(found, clipped + np.linalg.solve(strategy.dense(), noise), rtol=0, atol=2e-5)


def test_the_noise_has_the_covariance_of_the_inverse() -> None:
    steps, width = 6, 40_000
    strategy = Banded(steps, 3)
    inverse = np.linalg.inv(strategy.dense())
    expected = (SIGMA * CLIP) ** 2 * inverse @ inverse.T

    found = np.cov(releases(strategy, Seeded(4), width, [], steps))

    # Entry (s, t) of a sample covariance has variance (E_ss E_tt + E_st²) / n.
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / width)
    assert np.abs((found - expected) / error).max() < 5


def test_one_band_is_the_step_without_bands() -> None:
    examples = [torch.randn(2, 8, generator=torch.Generator().manual_seed(2))]

    fresh = releases(None, Seeded(5), 8, examples, 3)

    # C of one band is the identity but for the 2^-16 by which its entries are rounded down.
    np.testing.assert_allclose(releases(Banded(3, 1), Seeded(5), 8, examples, 3), fresh, rtol=3e-5)


@pytest.mark.parametrize("bands", [2, 5, 16])
def test_one_example_moves_all_mixed_sums_by_at_most_the_sensitivity(bands: int) -> None:
    """Over all the rows that it is in, at widths where rounding counts most, beside other examples' whole numbers."""
    width, steps = 200_000, bands + 3
    strategy, generator = Banded(steps, bands), torch.Generator().manual_seed(bands)
    others = [torch.randint(-(2**22), 2**22, (width,), generator=generator) for _ in range(steps)]
    for turn in (0, 2, steps - 1):
        example = torch.rand(width, generator=generator, dtype=torch.float64) - 0.5
        example = (example * (longest(width, bands) / example.norm())).round().long()
        present, absent = Correlated(strategy), Correlated(strategy)
        moved = 0.0
        for step, rest in enumerate(others):
            sums = [rest + example * (step == turn), rest.clone()]
            for correlated, total in zip((present, absent), sums, strict=True):
                correlated.mix(total)
                correlated.unmix(total.float())
            moved += float((sums[0] - sums[1]).double().square().sum())

        assert 0.98 * UNITS < np.sqrt(moved) <= UNITS


def test_the_worst_rounding_of_mixed_sums_leaves_an_example_short_enough() -> None:
    """An example with one value everywhere, beside others that make it be rounded up by nearly a whole step each time.

    It is as wide as its length allows: no longer than the sensitivity with the room that `longest` leaves, and longer
    without.
    """
    strategy, whole = Banded(2, 2), 1 << 16
    first, second = strategy.row(0)[0], strategy.row(1)[1]
    value = next(each for each in range(2000, 9000) if max(each * w % whole for w in (first, second)) < whole // 16)
    others = next(
        each
        for each in range(whole)
        if all((each * w + whole // 2) % whole + value * w % whole >= whole for w in (first, second))
    )
    moved = 0
    present, absent = Correlated(strategy), Correlated(strategy)
    for start in ([others + value, others], [0, 0]):
        sums = [torch.tensor([each]) for each in start]
        for correlated, each in zip((present, absent), sums, strict=True):
            correlated.mix(each)
            correlated.unmix(each.float())
        moved += int(sums[0] - sums[1]) ** 2

    def widest(bands: int) -> int:
        return max(width for width in range(1, 300_000, 50) if value * np.sqrt(width) <= longest(width, bands))

    assert np.sqrt(widest(2) * moved) <= UNITS < np.sqrt(widest(1) * moved)


def test_groups_are_drawn_for_each_example_alike() -> None:
    groups = drawn_groups(Seeded(6), 30_000, 3)

    assert np.abs(np.bincount(groups, minlength=3) / 10_000 - 1).max() < 5 * np.sqrt(2 / 30_000)
    np.testing.assert_array_equal(groups[:100], drawn_groups(Seeded(6), 100, 3), "whoever comes after")
