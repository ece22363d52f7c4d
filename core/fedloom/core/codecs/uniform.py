"""Evenly spaced levels on turned rows: stochastic rounding, or a dither that the other side takes off again."""

from functools import cache

import numpy as np
import numpy.typing as npt

from fedloom.core.codecs.api import CodecTraits
from fedloom.core.codecs.rotated import Rotated
from fedloom.core.codecs.rotation import Stream
from fedloom.core.schema import Array

__all__ = ["INT4", "INT8", "Dithered", "Rounded"]


class Rounded(Rotated):
    """Stochastic rounding: each value of a turned row up or down at random, to one of 2^bits - 1 levels.

    The largest value of a row is a level, so that none is cut off (QSGD, Alistarh et al., NeurIPS 2017, arXiv
    1610.02132, has the length of the vector there).
    """

    def _table(self) -> npt.NDArray[np.float32]:
        return _levels(self.bits)

    def _rounded(self, values: Array, square: Array, stream: Stream) -> tuple[npt.NDArray[np.uint8], Array]:
        most = (1 << self.bits - 1) - 1
        step = np.abs(values).max(1) / most
        places = np.divide(values, step[:, None], out=np.zeros_like(values), where=step[:, None] > 0)
        places += stream.between(values.shape)
        level = np.rint(places, out=places).clip(-most, most)
        return (level + most).astype(np.uint8), step


class Dithered(Rounded):
    """Subtractive dither: the same, but who decodes takes off again what was added before rounding.

    The error does not depend on the values, and its square is half as large (Roberts, IRE Trans. Information Theory,
    1962).
    """

    def _moved(self, values: Array, stream: Stream) -> Array:
        return values - stream.between(values.shape)


class INT8(Dithered):
    """Eight bits a value, dithered."""

    name = "int8"
    bits = 8
    traits = CodecTraits(unbiased=True, linear=False, mean_error=7e-5)


class INT4(Rounded):
    """Four bits a value by stochastic rounding. EDEN of four bits has a quarter of its error at the same length."""

    name = "int4"
    bits = 4
    traits = CodecTraits(unbiased=True, linear=False, mean_error=0.045)


@cache
def _levels(bits: int) -> npt.NDArray[np.float32]:
    most = (1 << bits - 1) - 1
    return np.arange(-most, most + 2, dtype=np.float32)
