"""Random rotations in exact whole numbers: the same bits from any BLAS, on any device.

A row is turned by random signs and a Hadamard transform, twice. Once is not enough: a row of two or three values that
are not zero stays far from random, and what rounds it is biased. A transform of 1024 values is two products with the
Hadamard matrix of 32.

Rows are rounded to whole numbers of 14 bits first, and to whole numbers again between the two transforms. Both cost
about 10^-8 of a row's square length. All sums are then whole numbers of at most 2^24, which float32 holds exactly, so
the order of summation changes nothing: those of the first transform because 1024 x 2^14 is that, those of the second
because the first keeps the length (Cauchy-Schwarz). Coming back, the numbers are levels of 9 bits, for which 2^24 is
over 40 standard deviations.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedloom.core.schema import Array

__all__ = ["Bits", "Stream", "Turned", "turned", "turned_back", "turned_whole"]

Bits = npt.NDArray[np.uint8]

_GRID = float(1 << 14)
_MOST_PER_UNIT = float(2**126)
"""So that it is a float32. Values below 10^-38 are then taken for 0."""


class Turned(NamedTuple):
    """Turned rows as whole numbers."""

    numbers: Array
    """Float32, shape (rows, width)."""
    square: Array
    """Squared length of each row of them, float64, shape (rows,)."""
    unit: Array
    """What 1 is worth, float64, shape (rows,)."""


@dataclass(frozen=True)
class Stream:
    """Random numbers of some rows: those for signs, and others for rounding. They are the same on every machine.

    Args:
        seed: Of the payload.
        part: Which rows, counted from 0.
    """

    seed: bytes
    part: int

    def signs(self, size: int) -> Bits:
        """Random bits for the signs of both passes over `size` values, eight in a byte."""
        each = -(-size // 8)
        return self._bytes(2 * each, 0).reshape(2, each)

    def between(self, shape: tuple[int, ...]) -> Array:
        """Uniform between -1/2 and 1/2, in steps of 2^-16."""
        return (self._bytes(2 * shape[0] * shape[1], 1).view("<u2").reshape(shape) - 32767.5) / 65536

    def _bytes(self, count: int, purpose: int) -> Bits:
        # Straight from the counter: what numpy's generators make of it may change from one version to the next.
        philox = np.random.Philox(key=np.frombuffer(self.seed, "<u8"), counter=[0, 0, self.part, purpose])
        words: npt.NDArray[np.uint64] = philox.random_raw(-(-count // 8))
        return words.astype("<u8", copy=False).view(np.uint8)[:count]


def turned_whole(values: Array, signs: Bits) -> Turned:
    """Float32 rows rounded to 2^-14 of the largest value of each, and turned."""
    largest = np.maximum(values.max(1), -values.min(1)).astype(np.float64)
    per_unit = np.full_like(largest, _MOST_PER_UNIT)
    np.divide(_GRID, largest, out=per_unit, where=largest > _GRID / _MOST_PER_UNIT)
    numbers = values * per_unit.astype(np.float32)[:, None]
    np.rint(numbers, out=numbers)
    square = np.einsum("ij,ij->i", numbers, numbers, dtype=np.float64)
    half = _transformed(_signed(numbers, signs[0]))
    # A power of two that makes rows no longer than they were before the transform.
    bits = values.shape[1].bit_length() - 1
    half *= np.float32(1 / (1 << (bits + 1) // 2))
    np.rint(half, out=half)
    longer = 1 << bits // 2
    return Turned(_transformed(_signed(half, signs[1])), square * longer**2, 1 / (per_unit * longer))


def turned(values: Array, signs: Bits) -> Array:
    """Rows turned, times their width."""
    return _transformed(_signed(_transformed(_signed(values, signs[0])), signs[1]))


def turned_back(values: Array, signs: Bits) -> Array:
    """What `turned` gave, back again, times the width."""
    return _signed(_transformed(_signed(_transformed(values), signs[1])), signs[0])


def _transformed(values: Array) -> Array:
    """The Hadamard transform of each row: as a matrix, from both sides by smaller ones."""
    count, width = values.shape
    bits = width.bit_length() - 1
    high, low = 1 << (bits + 1) // 2, 1 << bits // 2
    # One small product after another: a large one BLAS would share among threads that wait for each other's.
    right = values.reshape(count, high, low) @ _hadamard(low, values.dtype.str)
    both: Array = _hadamard(high, values.dtype.str) @ right
    return both.reshape(count, width)


@cache
def _hadamard(size: int, dtype: str) -> Array:
    matrix = np.ones((1, 1), dtype)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _signed(values: Array, bits: Bits) -> Array:
    signs = np.take(_eight_signs(values.dtype.str), bits, axis=0).reshape(-1)[: values.size]
    found: Array = np.multiply(values, signs.reshape(values.shape), out=signs.reshape(values.shape))
    return found


@cache
def _eight_signs(dtype: str) -> Array:
    """Of each byte, +1 for a bit that is 0 and -1 for one that is 1."""
    return 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(dtype)
