"""Noise that is correlated within a round: a banded strategy matrix, and what it does to the noise of single steps.

The T steps of a round release x + C^-1 z for their clipped sums x and independent noise z: C x + z is the Gaussian
mechanism, and C^-1 is applied to what it gives. C is lower triangular with b bands and columns of norm at most 1. An
example is sampled in every b-th step alone, so that no two of its contributions meet in C x, and a round costs what
ceil(T / b) Poisson-sampled steps at b times the rate cost (Choquette-Choo et al., "(Amplified) Banded Matrix
Factorization", NeurIPS 2023, arXiv 2306.08153). docs/privacy.md has the proof for what runs here.

C is the square root of the matrix that sums the steps, cut to b bands: the banded square root of Kalinin and Lampert
(NeurIPS 2024, arXiv 2405.13763). Noise of later steps then takes back some of that of earlier ones.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError

__all__ = ["FRACTION_BITS", "MAX_BANDS", "Banded", "check_bands", "participation"]

Floats = npt.NDArray[np.float64]

MAX_BANDS = 64
"""Most bands: with them the sums of 2^24 examples in one step still fit into 64 bits, see `Banded.row`."""

FRACTION_BITS = 16
"""Entries of C are whole multiples of 2^-16, so that C x is exact."""

_SHRUNK = 1 - 2.0**-40
"""What entries are scaled by before they are rounded down: more than the roundings of double precision, so that no
column is longer than 1."""


def participation(sampling_rate: float, steps: int, bands: int) -> tuple[float, int]:
    """How one example takes part in a round: what it costs is a function of these two and the noise.

    Returns:
        The rate at which it is sampled in a step of its turn, and the most steps of a round that are its turn.

    >>> participation(0.02, 10, 1), participation(0.02, 10, 4)
    ((0.02, 10), (0.08, 3))
    """
    return bands * sampling_rate, -(-steps // bands)


def check_bands(bands: int, sampling_rate: float, steps: int, *, private: bool) -> None:
    """Refuse bands that a round of so many steps at this rate does not have.

    Raises:
        ValueError: Names the keys of a run file.
    """
    if bands > 1 and not private:
        raise ValueError(
            f"privacy.noise_bands = {bands} with privacy.enabled = false, where clients add no noise; leave "
            "privacy.noise_bands out"
        )
    if bands > steps:
        raise ValueError(
            f"privacy.noise_bands = {bands} is more than the train.steps = {steps} of a round; set at most {steps}"
        )
    if bands > 1 and bands * sampling_rate > 1:
        raise ValueError(
            f"privacy.noise_bands = {bands} samples an example in one of {bands} steps at {bands} times "
            f"train.sampling_rate = {sampling_rate:g}, which is above 1; set at most {int(1 / sampling_rate)}"
        )


@dataclass(frozen=True)
class Banded:
    """C for the steps of a round.

    Entry (t, s) is c[t - s] over the norm of column s, for the first b coefficients c of
    (1 - z)^(-1/2) (1 - m z)^(-1/2): with as many bands as steps C² is the matrix by which SGD of momentum m sums a
    round's gradients, up to the scale of columns.

    Args:
        steps: T, size of the matrix, from 1.
        bands: b, 1 to `steps` and to `MAX_BANDS`.
        momentum: m in [0, 1).
    """

    steps: int
    bands: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no such matrix."""
        most = min(self.steps, MAX_BANDS)
        if not 1 <= self.bands <= most:
            raise ConfigError(f"{self.bands} noise bands over {self.steps} steps; 1 to {most} are allowed")

    def row(self, step: int) -> list[int]:
        """C[step, step - j] times 2^16 for j = 0, 1, ...: at most b whole numbers, those inside the matrix.

        Rounded down, so that no column is longer than 1. A row of b numbers sums to at most 2^16 times the root of b,
        times what clipped examples can come to, which is 2^20 each.
        """
        first = max(0, step - self.bands + 1)
        lengths = self._lengths()
        whole = 2**FRACTION_BITS * _SHRUNK
        return [
            math.floor(whole * self._coefficients[step - column] / lengths[column])
            for column in range(step, first - 1, -1)
        ]

    def dense(self) -> Floats:
        """C itself, shape (T, T), for checks."""
        found = np.zeros((self.steps, self.steps))
        for step in range(self.steps):
            for back, weight in enumerate(self.row(step)):
                found[step, step - back] = weight * 2.0**-FRACTION_BITS
        return found

    def spread(self) -> Floats:
        """Standard deviation of the noise that each step releases, over that of independent noise; shape (T,).

        The norms of the rows of C^-1, which are those of the inverse series, times the norms of columns.
        """
        return self._lengths() * np.sqrt(np.cumsum(_inverse(self.steps, self.bands, self.momentum) ** 2))

    @property
    def _coefficients(self) -> Floats:
        return _coefficients(self.bands, self.momentum)

    def _lengths(self) -> Floats:
        """Norm of each column before it is divided by it; the last ones are cut off by the matrix's end."""
        return _lengths(self.steps, self.bands, self.momentum)


@lru_cache(maxsize=64)
def _coefficients(bands: int, momentum: float) -> Floats:
    """The first coefficients of (1 - z)^(-1/2) (1 - m z)^(-1/2), which fall and are positive."""
    powers = np.arange(1, bands)
    root = np.cumprod(np.concatenate([[1.0], (2 * powers - 1) / (2 * powers)]))
    found: Floats = np.convolve(root, root * momentum ** np.arange(bands))[:bands]
    return found


@lru_cache(maxsize=64)
def _lengths(steps: int, bands: int, momentum: float) -> Floats:
    reach = np.minimum(bands, steps - np.arange(steps))
    found: Floats = np.sqrt(np.cumsum(_coefficients(bands, momentum) ** 2))[reach - 1]
    return found


@lru_cache(maxsize=64)
def _inverse(steps: int, bands: int, momentum: float) -> Floats:
    """The first coefficients of one over the banded series."""
    series = _coefficients(bands, momentum)
    found = np.zeros(steps)
    found[0] = 1.0
    for step in range(1, steps):
        near = found[max(0, step - bands + 1) : step]
        found[step] = -float(series[1 : len(near) + 1] @ near[::-1])
    return found
