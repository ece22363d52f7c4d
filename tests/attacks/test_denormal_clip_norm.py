"""A clip norm so small that sigma C is zero in float32, and a learning rate that makes the last unit visible.

The bias of 1000 in the broadcast leaves the other row a gradient of exactly zero and the target one of 1 in each bias,
whose clip factor, C over its norm, rounds up to one unit.
"""

import numpy as np
import pytest

from fedloom.client.privacy.auditing.attacks import Make, Singles
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded, poisson
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.gaussian import LEAST_CLIP_NORM
from tests.attacks.float_mechanism import FloatMechanism
from tests.attacks.heads import Head

DENORMAL = 0.55 * 2.0**-149
STEPS, RATE = 300, 0.005


def released(make: Make, clip_norm: float, there: bool) -> Singles:
    """The change of a round's 770 values; the row is in the data or not, and in the steps that chance puts it in."""
    entropy = Seeded(2)
    sampled = [there and len(poisson(entropy, 1, RATE)) == 1 for _ in range(STEPS)]
    assert any(sampled) == there
    head = Head(make, clip_norm=clip_norm, sigma=0.9, learning_rate=3e38, size=0.001, divisor=0.5)
    return head.round(sampled)


def test_float_noise_is_nothing_at_a_denormal_clip_norm() -> None:
    assert not released(FloatMechanism, DENORMAL, there=False).any(), "a noisy round of exact zeros"
    assert released(FloatMechanism, DENORMAL, there=True).any(), "the row shows"


@pytest.mark.parametrize(
    "clip_norm",
    [DENORMAL, 2.0**-149, 2.0**-126, 0.99 * LEAST_CLIP_NORM, 1.01 / LEAST_CLIP_NORM, float("inf"), float("nan")],
)
def test_a_clip_norm_that_the_arithmetic_does_not_hold_is_refused(clip_norm: float) -> None:
    with pytest.raises(ConfigError, match="is allowed"):
        released(PrivateOptimizer, clip_norm, there=False)


def test_the_least_clip_norm_keeps_its_noise_with_the_row_and_without_it() -> None:
    for there in (True, False):
        values = released(PrivateOptimizer, LEAST_CLIP_NORM, there)
        spread = values.astype(np.float64) / 3e38 * 0.5 / LEAST_CLIP_NORM
        # 300 steps of deviation 0.9, which the row's three or so steps of at most 1 do not change.
        assert np.isfinite(spread).all()
        assert spread.std() == pytest.approx(0.9 * np.sqrt(STEPS), rel=0.15)
