"""Membership from the low bits of a noised zero: C = 1, sigma = 0.9, the head alone, its bias 1000 in the broadcast.

Every row but one then has a gradient of exactly zero. The coordinator asks of each released value whether it can have
come from a sum of zero: float32 noise times 0.9 leaves out about one value in ten.
"""

import os

import numpy as np
import pytest

from fedloom.client.privacy.auditing.attacks import Make, Singles
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.core.privacy.gaussian import longest
from tests.attacks.float_mechanism import FloatMechanism
from tests.attacks.heads import WIDTH, Head

SIGMA = 0.9
FULL = bool(os.environ.get("FEDLOOM_PROVE"))
ROUNDS = 10_000 if FULL else 250
"""In each arm, with the row and without it."""

RULES = ("no float times sigma", "no step of the grid", "last bit", "last place")


def told(released: Singles) -> list[bool]:
    """What each rule of the attacker says of a round; true is "the row was there"."""
    near = released / np.float32(SIGMA)
    floats = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    explained = np.any([each * np.float32(SIGMA) == released for each in floats], axis=0)
    step = np.float32(1 / longest(2 * WIDTH + 2))
    places = np.rint(released / step)
    last, place = released.view(np.int32) & 1, places.astype(np.int64) & 1
    half = len(released) / 2
    return [
        not explained.all(),
        bool((np.abs(places * step - released) > np.spacing(np.abs(released))).any()),
        bool(last.sum() > half),
        bool(place.sum() > half),
    ]


def attacked(make: Make) -> tuple[np.ndarray, np.ndarray]:
    """How often each rule says so with the row and without it; shape (rules,) each."""
    head = Head(make, clip_norm=1.0, sigma=SIGMA, learning_rate=1.0)
    arms = [np.array([told(head.round([there])[: 2 * WIDTH]) for _ in range(ROUNDS)]) for there in (True, False)]
    return arms[0].sum(0), arms[1].sum(0)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_float_noise_gives_the_row_away_in_every_round() -> None:
    found, wrong = attacked(FloatMechanism)

    assert found[0] == ROUNDS, "detected in every round it was in"
    assert wrong[0] == 0, "and in no other"


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_no_rule_tells_rounds_with_the_row_from_rounds_without_it() -> None:
    found, wrong = attacked(PrivateOptimizer)

    for rule, with_row, without in zip(RULES, found, wrong, strict=True):
        middle = (with_row + without) / 2 / ROUNDS
        # Five standard errors of a difference of two proportions.
        assert abs(with_row - without) <= 5 * np.sqrt(2 * ROUNDS * middle * (1 - middle)), rule
