"""What codecs have in common that turn a row before they round it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.core.codecs.api import NO_SEED, SEED_BYTES, CodecTraits
from fedloom.core.codecs.packing import pack, packed_bytes, unpack
from fedloom.core.codecs.rotation import Stream, turned_back, turned_whole
from fedloom.core.codecs.rows import Rows, joined, rows, taken
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Rotated"]

_LARGEST = 1e36


@dataclass(frozen=True)
class Rotated:
    """A seed, a float32 scale for each row, and a few bits for each value.

    A turned row looks normal whatever was in it, so that one set of levels fits all. Each payload has a rotation of its
    own: the errors of many, seen together, average out.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    traits: ClassVar[CodecTraits]

    @property
    def largest(self) -> float:
        """Largest absolute value that can be encoded."""
        return _LARGEST

    def encoded_size(self, schema: Schema) -> int:
        """Seed, four bytes a row, `bits` bits a value; rows that are not whole are padded to a power of two."""
        parts = rows(schema)
        lengths = [4 * part.count + packed_bytes(part.size, self.bits) for part in parts]
        return SEED_BYTES + sum(lengths) if parts else 0

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        """The seed, the scales of all rows, the levels of all values.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A value is not finite, or beyond `largest`.
        """
        schema.check(tensors)
        for name, tensor in tensors.items():
            if not max(tensor.max(), -tensor.min()) <= self.largest:  # also where it is NaN
                raise CodecError(f"{name!r} has a value that is not finite or beyond {self.largest:g}; use fp32")
        if not rows(schema):
            return b""
        scales, codes = [], []
        for number, values in enumerate(joined(schema, tensors)):
            stream = Stream(seed, number)
            each = turned_whole(values, stream.signs(values.size))
            code, scale = self._rounded(each.numbers, each.square, stream)
            scales.append((scale * each.unit / values.shape[1]).astype("<f4").tobytes())
            codes.append(pack(code, self.bits))
        return b"".join([seed, *scales, *codes])

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """The tensors, float32.

        Raises:
            CodecError: The payload is not exactly as long as the schema says, or a scale is none.
        """
        if len(payload) != (expected := self.encoded_size(schema)):
            raise CodecError(f"payload has {len(payload)} bytes; {self.name} under this schema needs {expected}")
        if not (parts := rows(schema)):
            return {}
        view, seed, table = memoryview(payload), payload[:SEED_BYTES], self._table()
        scales = np.frombuffer(payload, "<f4", sum(part.count for part in parts), SEED_BYTES)
        values, offset, row = np.empty(schema.size, np.float32), SEED_BYTES + scales.nbytes, 0
        for number, part in enumerate(parts):
            length, stream = packed_bytes(part.size, self.bits), Stream(seed, number)
            scale = scales[row : row + part.count, None]
            _check(scale, table, part)
            levels = unpack(view[offset : offset + length], part.size, table).reshape(part.count, part.width)
            back = turned_back(self._moved(levels, stream), stream.signs(part.size))
            back *= scale
            values[part.start : part.start + part.used] = back.reshape(-1)[: part.used]
            offset, row = offset + length, row + part.count
        return taken(schema, values)

    @abstractmethod
    def _table(self) -> npt.NDArray[np.float32]:
        """The level behind each code, 2^bits of them."""

    @abstractmethod
    def _rounded(self, values: Array, square: Array, stream: Stream) -> tuple[npt.NDArray[np.uint8], Array]:
        """Codes of turned rows, whose squared lengths are `square`, and what a level of each row is worth."""

    def _moved(self, values: Array, stream: Stream) -> Array:
        """Levels as they are to be turned back."""
        return values


def _check(scale: Array, table: Array, part: Rows) -> None:
    """Refuse scales under which a value could overflow; also what is NaN."""
    most = float(np.finfo(np.float32).max) / (float(np.abs(table).max() + 1) * part.width**2)
    if not ((scale >= 0) & (scale <= most)).all():
        raise CodecError(f"a row has a scale of {float(scale.max()):g}; 0 to {most:g} are possible")
