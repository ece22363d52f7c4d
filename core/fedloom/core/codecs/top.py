"""The largest values alone; what is left out goes with the next update (Stich et al., NeurIPS 2018, 1809.07599)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.core.codecs.api import NO_SEED, CodecTraits
from fedloom.core.codecs.rows import laid, taken
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["TOP10"]


@dataclass(frozen=True)
class TOP10:
    """A tenth of all values, those of the largest size, in half precision, and a bit for each that says which.

    Biased: it needs error feedback, and clients that take part again and again. Under DP it mostly picks noise.
    """

    name: ClassVar[str] = "top10"
    traits: ClassVar[CodecTraits] = CodecTraits(unbiased=False, linear=False, mean_error=0.9, feedback=True)

    @property
    def largest(self) -> float:
        """Largest absolute value that can be encoded."""
        return 1e36

    def encoded_size(self, schema: Schema) -> int:
        """A float32 scale, a bit a value, two bytes for every tenth."""
        return 4 + -(-schema.size // 8) + 2 * _kept(schema.size) if schema.size else 0

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        """The largest value, the bits, the values over the largest."""
        schema.check(tensors)
        if not schema.size:
            return b""
        values = laid(schema, tensors)
        size = np.abs(values)
        scale = np.float32(size.max())
        if not scale <= self.largest:
            raise CodecError(f"a value is not finite or beyond {self.largest:g}; use fp32")
        count = _kept(schema.size)
        bound = np.partition(size, -count)[-count]
        kept = size > bound
        even = np.flatnonzero(size == bound)
        kept[even[: count - int(kept.sum())]] = True  # of equal ones the first
        shares = values[kept] / scale if scale else values[kept]
        return b"".join([scale.astype("<f4").tobytes(), np.packbits(kept).tobytes(), shares.astype("<f2").tobytes()])

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """The tensors, zero where nothing was kept."""
        if len(payload) != (expected := self.encoded_size(schema)):
            raise CodecError(f"payload has {len(payload)} bytes; {self.name} under this schema needs {expected}")
        if not schema.size:
            return {}
        count = _kept(schema.size)
        scale, bits = np.frombuffer(payload, "<f4", 1)[0], np.frombuffer(payload, np.uint8, -(-schema.size // 8), 4)
        shares = np.frombuffer(payload, "<f2", count, 4 + len(bits)).astype(np.float32)
        kept = np.unpackbits(bits)
        if kept[schema.size :].any() or int(kept.sum()) != count:
            raise CodecError(f"{int(kept.sum())} values are marked; {count} of {schema.size} are sent")
        if not (0 <= scale <= self.largest and (np.abs(shares) <= 1).all()):
            raise CodecError("a value is beyond the largest that the payload names")
        values = np.zeros(schema.size, np.float32)
        values[kept[: schema.size].astype(bool)] = shares * scale
        return taken(schema, values)


def _kept(count: int) -> int:
    return -(-count // 10)
