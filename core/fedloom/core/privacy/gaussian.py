"""Gaussian noise on a public grid, drawn exactly.

A bounded contribution is rounded to whole numbers, of which `UNITS` are the sensitivity, and the numbers are summed
without error. A normal variable that is rounded to a whole number is added. For whole z, z + round(N) = round(z + N):
what is released is a function of the Gaussian mechanism's output over the reals, so its privacy is exactly that of the
Gaussian mechanism, for any number of values, and no low bit says more than the real number would. docs/privacy.md has
the proof.

The draws are exact as well: Karney's rejection sampler for the normal distribution (ACM TOMS 42, 2016, algorithm N),
whose uniform deviates have as many random bits as a decision needs. The first bits decide all but a few draws in a
billion; the rest go to a slow path in exact arithmetic. No transform of floating-point numbers is involved, so that no
value is impossible, or more likely than it should be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError

__all__ = [
    "LARGEST_DEVIATION",
    "LEAST_CLIP_NORM",
    "UNITS",
    "UNSURE",
    "Integers",
    "Words",
    "candidates",
    "check_deviation",
    "decided",
    "deviation",
    "edges",
    "longest",
    "rounded_normal",
]

Integers = npt.NDArray[np.int64]
Words = Callable[[int], npt.NDArray[np.uint64]]
"""Gives so many independent uniform words of 64 bits each; never the same ones again."""

UNITS = 1 << 20
"""Steps of the grid in the most that one contribution may add, in L2. Rounding then costs about sqrt(d) / 2 / UNITS of
the clipping norm for d values (0.03 % for 339,000), and the noise is thousands of steps wide."""

LARGEST_DEVIATION = (1 << 31) - 1
"""Widest noise in steps that the 64-bit arithmetic here holds: a noise multiplier of 2047."""

LEAST_CLIP_NORM = 2.0**-40
"""Smallest clipping norm; one over it is the largest. Values whose squares underflow in float32 are then below half a
step of the grid, and no factor overflows. A run's own bounds are narrower."""

_SLACK = 2.0**-12
"""Relative error allowed for in a norm that was computed in float32, and in scaling by it: see `longest`."""

_BATCH = 1 << 14
"""Candidates at a time, which stay in the processor's cache."""

UNSURE = 2.0**-33 + 2.0**-44
"""How near to a probability the middle of a deviate of 32 bits may lie before exact arithmetic decides: half its width,
and more than the error of the probability in double precision, which is below 2^-47."""

_DIGITS, _ERROR = 120, Decimal("1e-110")
"""Decimal digits of the exact arithmetic, enough for more than 300 bits of a deviate, and its error."""

_HALF, _LOW = np.uint64(1 << 31), np.uint64((1 << 32) - 1)


def deviation(noise_multiplier: float) -> int:
    """Standard deviation of the noise in steps of the grid, rounded up: never less noise than is accounted.

    Raises:
        ConfigError: It is not positive, or too large.

    >>> deviation(1.0) == UNITS
    True
    """
    if not 0 < noise_multiplier <= LARGEST_DEVIATION / UNITS:
        raise ConfigError(
            f"noise multiplier {noise_multiplier!r}; above 0 and at most {LARGEST_DEVIATION / UNITS:.0f} is allowed"
        )
    return math.ceil(noise_multiplier * UNITS)  # the product is exact: UNITS is a power of two


def longest(values: int, bands: int = 1) -> float:
    """Length in steps to which a contribution of so many float32 values is scaled before it is rounded.

    Rounding each value to the nearest whole number moves the vector by at most sqrt(values) / 2, and its length was
    measured and scaled in float32, so that what is rounded may be longer by one part in four thousand than it seems.
    What comes out is at most UNITS long.

    With noise bands the contribution is in as many sums, each of which is multiplied and rounded once more. There
    rounding makes the difference between two sums of whole numbers longer by less than 1 a value, sqrt(bands * values)
    in all; what comes out is UNITS long again.

    >>> 0.998 * UNITS < longest(339_000) < UNITS
    True
    >>> 0.996 * UNITS < longest(339_000, bands=8) < longest(339_000)
    True
    """
    mixed = math.sqrt(bands * values) if bands > 1 else 0.0
    return (UNITS - math.sqrt(values) / 2 - mixed) * (1 - _SLACK)


def rounded_normal(words: Words, deviation: int, count: int) -> Integers:
    """Independent draws of a normal variable of mean 0, each rounded to the nearest whole number.

    Args:
        words: The source of randomness.
        deviation: Standard deviation of the normal variable, 1 to `LARGEST_DEVIATION`.
        count: Number of draws, shape of the result.

    >>> from numpy.random import Philox, Generator
    >>> source = Generator(Philox(1))
    >>> draws = rounded_normal(lambda n: source.integers(0, 2**64, n, np.uint64), 1000, 100_000)
    >>> bool(abs(draws.mean()) < 12 and abs(draws.std() / 1000 - 1) < 0.01)
    True
    """
    check_deviation(deviation)
    drawn = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        some = _accepted(words, deviation, min(_BATCH, candidates(count - filled)))[: count - filled]
        drawn[filled : filled + len(some)] = some
        filled += len(some)
    return drawn


def check_deviation(deviation: int) -> None:
    """Refuse a deviation that the arithmetic here does not hold.

    Raises:
        ConfigError: It is below 1, or above `LARGEST_DEVIATION`.
    """
    if not 1 <= deviation <= LARGEST_DEVIATION:
        raise ConfigError(f"noise of deviation {deviation} steps; 1 to {LARGEST_DEVIATION} is allowed")


def candidates(missing: int) -> int:
    """How many candidates to draw for so many values that are missing: most often enough, since 0.715 are accepted.

    For 10,000 values they are too few once in a thousand draws, for 50,000 once in 10^9, for a million never.
    """
    return int(1.42 * missing) + 16


def _accepted(words: Words, deviation: int, count: int) -> Integers:
    """Those of so many candidates that are accepted, about 0.715 of them, in the order in which they were drawn."""
    half, second = words(count).view(np.uint32), words(count)
    place, test, negative = half[:count] >> 1, half[count:], (half[:count] & 1).astype(np.int64)
    whole, unsure = np.zeros(count, np.int8), np.zeros(count, bool)
    for edge in edges():  # k with probability in proportion to exp(-k²/2)
        whole += place >= edge
        unsure |= place == edge
    part = second * 2.0**-64
    chance = np.exp(-0.5 * part * (2.0 * whole + part))
    distance = (test + 0.5) * 2.0**-32 - chance
    unsure |= np.abs(distance) <= UNSURE
    keep = distance < 0
    # deviation · part + 1/2, rounded down to a multiple of 2^-32; the products fit into 64 bits.
    steps = np.uint64(deviation)
    scaled = steps * (second >> np.uint64(32)) + ((steps * (second & _LOW)) >> np.uint64(32)) + _HALF
    unsure |= (scaled & _LOW) == _LOW  # bits that were not drawn could still carry
    values = deviation * whole.astype(np.int64) + (scaled >> np.uint64(32)).astype(np.int64)
    for index in np.flatnonzero(unsure):
        exact = decided(words, int(place[index]), int(second[index]), int(test[index]), deviation)
        keep[index], values[index] = exact is not None, exact or 0
    signed: Integers = (values ^ -negative) + negative  # two's complement: the sign changes where negative is 1
    kept: Integers = signed[keep]
    return kept


@lru_cache(maxsize=1)
def edges() -> tuple[int, ...]:
    """floor(2^31 P(k <= j)) for j = 0, 1, ... up to the first 2^31 - 1, which is that of j = 6."""
    found = [int(_below(j) * 2**31) for j in range(16)]
    return tuple(found[: found.index(2**31 - 1) + 1])


@lru_cache(maxsize=64)
def _below(j: int) -> Decimal:
    """P(k <= j) for P(k) in proportion to exp(-k²/2), within `_ERROR`."""
    with localcontext(prec=_DIGITS):
        terms = [(Decimal(-k * k) / 2).exp() for k in range(math.isqrt(5 * _DIGITS) + 1)]
        return sum(terms[: j + 1], Decimal(0)) / sum(terms, Decimal(0))


@dataclass
class _Uniform:
    """A uniform deviate of which the first bits are known: it lies in [bits, bits + 1) / 2^known."""

    words: Words
    bits: int
    known: int

    def more(self) -> None:
        """Draw 64 further bits."""
        self.bits, self.known = (self.bits << 64) | int(self.words(1)[0]), self.known + 64

    def ends(self) -> tuple[Decimal, Decimal]:
        """The interval that it lies in."""
        return Decimal(self.bits) / 2**self.known, Decimal(self.bits + 1) / 2**self.known


def decided(words: Words, place: int, part: int, test: int, deviation: int) -> int | None:
    """One candidate in exact arithmetic: round(deviation · (k + part)), or None when it is rejected.

    Args:
        words: Further bits, one word at a time.
        place: First 31 bits of the deviate that gives k.
        part: First 64 bits of the fraction.
        test: First 32 bits of the deviate that decides on acceptance.
        deviation: Of the noise, in steps.
    """
    whole_of, fraction, against = _Uniform(words, place, 31), _Uniform(words, part, 64), _Uniform(words, test, 32)
    with localcontext(prec=_DIGITS):
        while (whole := _whole(whole_of)) is None:
            whole_of.more()
        while (passed := _passes(whole, fraction, against)) is None:
            fraction.more()
            against.more()
    if not passed:
        return None
    while (steps := _nearest(deviation, fraction)) is None:
        fraction.more()
    return deviation * whole + steps


def _whole(place: _Uniform) -> int | None:
    """K with probability in proportion to exp(-k²/2); None when the bits drawn so far leave it open."""
    low, high = place.ends()
    j = 0
    while low >= _below(j) + _ERROR:
        j += 1
    return j if high <= _below(j) - _ERROR else None


def _passes(whole: int, part: _Uniform, test: _Uniform) -> bool | None:
    """Whether test < exp(-part (2 k + part) / 2); None when the bits drawn so far leave it open."""
    most, least = ((-end * (2 * whole + end) / 2).exp() for end in part.ends())
    low, high = test.ends()
    return True if high <= least - _ERROR else False if low >= most + _ERROR else None


def _nearest(deviation: int, part: _Uniform) -> int | None:
    """round(deviation · part); None when the bits drawn so far leave it open."""
    halves, one = 2 * deviation, 1 << part.known
    low, high = ((halves * part.bits + one) // (2 * one), (halves * (part.bits + 1) + one - 1) // (2 * one))
    return low if low == high else None
