"""The noise on the grid: exact, of the right law, and never narrower than what is accounted."""

import math
from collections.abc import Callable
from decimal import localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from scipy import stats

from fedloom.core.errors import ConfigError
from fedloom.core.privacy import gaussian
from fedloom.core.privacy.gaussian import LARGEST_DEVIATION, UNITS, Words, deviation, longest, rounded_normal


def source(seed: int) -> Words:
    generator = Generator(Philox(seed))
    return lambda count: generator.integers(0, 1 << 64, count, np.uint64)


@pytest.mark.parametrize("wide", [1, 2, 7])
def test_every_value_has_the_probability_of_a_rounded_normal_variable(wide: int) -> None:
    """Chi-square over all values, for deviations so small that rounding shapes the law."""
    count = 400_000
    draws = rounded_normal(source(wide), wide, count)

    values = np.arange(-4 * wide, 4 * wide + 1)
    inner = stats.norm.cdf((values + 0.5) / wide) - stats.norm.cdf((values - 0.5) / wide)
    tail = stats.norm.sf((values[-1] + 0.5) / wide)
    expected = count * np.concatenate([[tail], inner, [tail]])
    found = np.array(
        [(draws < values[0]).sum(), *((draws == each).sum() for each in values), (draws > values[-1]).sum()]
    )
    assert stats.chisquare(found, expected).pvalue > 1e-4


def test_wide_noise_is_normal_and_its_low_bits_are_uniform() -> None:
    draws = rounded_normal(source(3), UNITS, 200_000)

    assert stats.kstest(draws / UNITS, "norm").pvalue > 1e-4
    assert stats.chisquare(np.bincount(draws & 255, minlength=256)).pvalue > 1e-4


def test_neighbouring_draws_their_signs_and_halves_are_independent() -> None:
    draws = rounded_normal(source(4), UNITS, 1 << 18) / UNITS

    for lag in (1, 2, 3, 1 << 14, 1 << 17):
        for one, other in ((draws, draws), (abs(draws), draws), (abs(draws), abs(draws))):
            assert abs(np.corrcoef(one[:-lag], other[lag:])[0, 1]) < 5 / math.sqrt(len(draws) - lag)


def test_the_slow_path_decides_as_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate by exact arithmetic, from the same words."""
    fast = rounded_normal(source(5), 12345, 2000)

    monkeypatch.setattr(gaussian, "UNSURE", 2.0)

    np.testing.assert_array_equal(rounded_normal(source(5), 12345, 2000), fast)


def words_of(halves: list[int], parts: list[int], more: Words) -> Words:
    """Sixteen candidates that begin with the given bits, then other words."""
    first = np.zeros(64, np.uint32)
    first[: len(halves) // 2], first[32 : 32 + len(halves) // 2] = halves[::2], halves[1::2]
    second = np.zeros(32, np.uint64)
    second[: len(parts)] = parts
    given = [first.view(np.uint64)[:32], second]

    def words(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        if not given:
            return more(count)
        found = given.pop(0)
        assert len(found) == count
        return found

    return words


@pytest.mark.parametrize("fill", [0, (1 << 64) - 1])
def test_a_draw_at_the_edge_of_a_rounding_step_takes_further_bits(fill: int) -> None:
    """1000·part lies just below 1/2 after 64 bits; what follows carries it over or does not."""
    part = -(-(1 << 63) // 1000) - 1  # the largest with 1000·part < 2^63
    words = words_of([0, 0], [part], lambda count: np.full(count, fill, np.uint64))

    candidates = gaussian._accepted(words, 1000, 32)

    assert candidates[0] == (1 if fill else 0)


@pytest.mark.parametrize("edge", range(len(gaussian.edges())))
def test_a_draw_at_the_edge_of_a_whole_part_takes_further_bits(edge: int) -> None:
    place = gaussian.edges()[edge] << 1
    found = set()
    for fill in (0, (1 << 64) - 1):
        uniform = gaussian._Uniform(lambda count, fill=fill: np.full(count, fill, np.uint64), place >> 1, 31)  # type: ignore[misc]
        with localcontext(prec=gaussian._DIGITS):
            assert gaussian._whole(uniform) is None
            uniform.more()
            found.add(gaussian._whole(uniform))
    assert edge in found
    assert len(found) == 2


@pytest.mark.parametrize("chance", ["below", "above"])
def test_a_draw_at_the_edge_of_being_accepted_takes_further_bits(chance: str) -> None:
    part = gaussian._Uniform(source(1), 1 << 63, 64)  # x = 1/2, k = 0: exp(-1/8)
    test = int(math.exp(-1 / 8) * 2**32)
    fill = 0 if chance == "below" else (1 << 64) - 1
    uniform = gaussian._Uniform(lambda count: np.full(count, fill, np.uint64), test, 32)
    with localcontext(prec=gaussian._DIGITS):
        assert gaussian._passes(0, part, uniform) is None
        uniform.more()
        assert gaussian._passes(0, part, uniform) is (chance == "below")


@given(st.floats(1e-6, LARGEST_DEVIATION / UNITS))
def test_the_noise_is_never_narrower_than_what_is_accounted(noise_multiplier: float) -> None:
    assert noise_multiplier * UNITS <= deviation(noise_multiplier) < noise_multiplier * UNITS + 1


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 2048.0])
def test_noise_that_the_grid_cannot_hold_is_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match="at most 2048 is allowed"):
        deviation(wrong)


@pytest.mark.parametrize("wrong", [0, LARGEST_DEVIATION + 1])
def test_a_deviation_out_of_range_is_refused(wrong: int) -> None:
    with pytest.raises(ConfigError, match="is allowed"):
        rounded_normal(source(1), wrong, 1)


def test_the_widest_noise_does_not_overflow() -> None:
    draws = rounded_normal(source(6), LARGEST_DEVIATION, 100_000)

    assert stats.kstest(draws / LARGEST_DEVIATION, "norm").pvalue > 1e-4


@pytest.mark.parametrize("values", [1, 1000, 10**6, 10**9])
@pytest.mark.parametrize("draw", [lambda n: np.ones(n), lambda n: np.random.default_rng(1).standard_normal(n)])
def test_a_rounded_contribution_is_never_longer_than_the_sensitivity(
    values: int, draw: Callable[[int], np.ndarray[tuple[int], np.dtype[np.float64]]]
) -> None:
    # The bound for 10^9 values holds for each of the first million of them as well.
    vector = draw(min(values, 10**6))
    scaled = vector * (longest(values) / np.linalg.norm(vector))

    assert np.linalg.norm(np.rint(scaled)) <= UNITS
    assert longest(values) > 0.98 * UNITS
