"""The count that an adaptive clip norm follows is noised, too."""

import math

import numpy as np
import pytest

from fedloom.strategies.api import Update
from fedloom.strategies.transforms.user_level_dp import count_noise
from tests.strategies.transforms.test_user_level import SCALAR, round_of, wrapped


def test_the_count_within_the_clip_norm_has_its_noise() -> None:
    """What the next clip norm tells of the count, over many secrets: deviation s over the cohort, in the exponent."""
    steps = []
    for number in range(600):
        strategy = wrapped(
            cohort=20, noise_multiplier=1.0, target_quantile=0.5, clip_norm=2.0, secret=number.to_bytes(32, "big")
        )
        state = strategy.init(SCALAR, SCALAR.zeros(), 0)
        after = round_of(strategy, state, [Update("ada", 1.0, SCALAR.zeros(), SCALAR.zeros())])
        steps.append(-math.log(float(after.memory["user_level/clip_norm"]) / 2.0) / 0.2)

    # One of twenty is within, the rest is missing and counts as half: 1 / 40 above the target.
    expected = count_noise(1.0, 20)[1] / 20
    assert np.std(steps) == pytest.approx(expected, rel=5 / math.sqrt(1200))
    assert np.mean(steps) == pytest.approx(1 / 40, abs=5 * expected / math.sqrt(600))
    assert len(np.unique(steps)) > 300
