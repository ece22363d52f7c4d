"""Where the sampler's fast path may not decide, and what a contribution may be before it is rounded."""

import math

import numpy as np
import pytest

from fedloom.core.privacy import gaussian
from fedloom.core.privacy.gaussian import UNITS, longest
from tests.core.privacy.test_gaussian import words_of


def candidate(place: int, part: int, test: int, fill: int) -> list[int]:
    """What becomes of one candidate with these first bits, followed by words of this value; the others are zeros."""
    halves = np.zeros(64, np.uint32)
    halves[0], halves[32] = place << 1, test
    second = np.zeros(32, np.uint64)
    second[0] = part
    given = [halves.view(np.uint64)[:32], second]

    def words(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return given.pop(0) if given else np.full(count, fill, np.uint64)

    found = gaussian._accepted(words, 1000, 32)
    return [int(each) for each in found[: len(found) - 31]]


def test_a_candidate_at_the_edge_of_being_accepted_is_decided_by_further_bits() -> None:
    half = 1 << 63  # part 1/2 and k = 0: accepted with probability exp(-1/8)
    test = int(math.exp(-1 / 8) * 2**32)

    assert candidate(0, half, test, 0) == [500]
    assert candidate(0, half, test, (1 << 64) - 1) == []


@pytest.mark.parametrize("edge", [0, 1, 2])
def test_a_candidate_at_the_edge_of_a_whole_part_is_decided_by_further_bits(edge: int) -> None:
    place = gaussian.edges()[edge]

    assert candidate(place, 0, 0, 0) == [1000 * edge]
    assert candidate(place, 0, 0, (1 << 64) - 1) == [1000 * (edge + 1)]


def test_words_of_agrees_on_where_bits_lie() -> None:
    words = words_of([0, 0], [1 << 63], lambda count: np.zeros(count, np.uint64))

    assert gaussian._accepted(words, 1000, 32)[0] == candidate(0, 1 << 63, 0, 0)[0]


@pytest.mark.parametrize("values", [1, 30, 10**4, 10**6])
def test_a_norm_that_was_measured_too_small_leaves_a_contribution_short_enough(values: int) -> None:
    """By the relative error that a norm and a product in float32 are allowed, 2^-12."""
    vector = np.random.default_rng(1).standard_normal(values)
    measured = np.linalg.norm(vector) * (1 - 0.99 * 2.0**-12)

    assert np.linalg.norm(np.rint(vector * (longest(values) / measured))) <= UNITS


def test_the_worst_rounding_leaves_a_contribution_short_enough() -> None:
    """All values alike, and a hair above a half: rounding makes each longer by a half."""
    worst = 0.0
    for values in range(10**6, 10**6 + 4000):
        worst = max(worst, round(longest(values) / math.sqrt(values) + 1e-9) * math.sqrt(values))

    assert 0.999 * UNITS < worst <= UNITS
