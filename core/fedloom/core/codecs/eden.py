"""EDEN, 1 to 4 bits a value (Vargaftik et al., ICML 2022, arXiv 2108.08842)."""

from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.core.codecs.api import CodecTraits
from fedloom.core.codecs.rotated import Rotated
from fedloom.core.codecs.rotation import Stream
from fedloom.core.schema import Array

__all__ = ["EDEN1", "EDEN2", "EDEN3", "EDEN4", "Eden"]


class Eden(Rotated):
    """A turned row, rounded to the best levels for normal values (Lloyd 1982, Max 1960), times |x|^2 / <Q(Rx), Rx>.

    With that scale what is decoded is x on average over rotations. Where the levels leave the share D of a normal
    value's variance, the squared error is D / (1 - D) of the squared length.
    """

    levels: ClassVar[tuple[int, ...]]
    """The positive half, in whole numbers that share a factor: what is summed on the way back is exact."""
    bounds: ClassVar[tuple[float, ...]]
    """Between them, in standard deviations."""

    def _table(self) -> npt.NDArray[np.float32]:
        return _both(self.levels)

    def _rounded(self, values: Array, square: Array, stream: Stream) -> tuple[npt.NDArray[np.uint8], Array]:
        size, deviation = np.abs(values), np.sqrt(square / values.shape[1]).astype(np.float32)
        code = np.zeros(values.shape, np.uint8)
        for bound in self.bounds:
            code += size > (np.float32(bound) * deviation)[:, None]
        along = np.einsum("ij,ij->i", np.take(np.array(self.levels, np.float32), code), size, dtype=np.float64)
        scale = np.divide(square, along, out=np.zeros_like(along), where=along > 0)
        code |= np.signbit(values).astype(np.uint8) << np.uint8(self.bits - 1)
        return code, scale


class EDEN1(Eden):
    """One bit a value, the sign of what is turned (DRIVE, Vargaftik et al., NeurIPS 2021, arXiv 2105.08339)."""

    name = "eden1"
    bits = 1
    levels = (1,)
    bounds = ()
    traits = CodecTraits(unbiased=True, linear=False, mean_error=0.5708)


class EDEN2(Eden):
    """Two bits a value, a sixteenth of float32."""

    name = "eden2"
    bits = 2
    levels = (153, 511)
    bounds = (0.98159882,)
    traits = CodecTraits(unbiased=True, linear=False, mean_error=0.1331)


class EDEN3(Eden):
    """Three bits a value."""

    name = "eden3"
    bits = 3
    levels = (58, 180, 319, 511)
    bounds = (0.50054973, 1.04995728, 1.74792749)
    traits = CodecTraits(unbiased=True, linear=False, mean_error=0.03579)


class EDEN4(Eden):
    """Four bits a value, an eighth of float32."""

    name = "eden4"
    bits = 4
    levels = (24, 73, 123, 176, 235, 303, 387, 511)
    bounds = (0.25822166, 0.52240371, 0.79954979, 1.09928583, 1.43713879, 1.84353181, 2.4008034)
    traits = CodecTraits(unbiased=True, linear=False, mean_error=0.009593)


@cache
def _both(levels: tuple[int, ...]) -> npt.NDArray[np.float32]:
    positive = np.array(levels, np.float32)
    return np.concatenate([positive, -positive])
