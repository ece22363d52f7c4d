"""Plain little-endian values, all tensors in schema order with nothing between them: fp32, fp16 and bf16."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.core.codecs.api import NO_SEED, CodecTraits
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["BF16", "FP16", "FP32", "Dense"]


@dataclass(frozen=True)
class Dense:
    """Each value in one IEEE-754 format, little-endian."""

    name: ClassVar[str]
    dtype: ClassVar[str]
    traits: ClassVar[CodecTraits]

    @property
    def largest(self) -> float:
        """Largest finite value of the format."""
        return float(np.finfo(self.dtype).max)

    def packed(self, values: Array) -> npt.NDArray[Any]:
        """Values in the format, a contiguous array of any type of its width."""
        return np.ascontiguousarray(values, self.dtype)

    def read(self, payload: bytes) -> Array:
        """The values in a payload, one dimension, float32 or narrower."""
        return np.frombuffer(payload, self.dtype)

    def encoded_size(self, schema: Schema) -> int:
        """Number of values times the width of one."""
        return schema.size * np.dtype(self.dtype).itemsize

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        """Concatenate the values.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A finite value overflows the narrower format.
        """
        schema.check(tensors)
        # One join is the only copy of values that are already in the wire's format.
        return b"".join(self._values(spec.name, tensors[spec.name]) for spec in schema.tensors)

    def _values(self, name: str, tensor: Array) -> memoryview:
        with np.errstate(over="ignore"):  # an overflow is found below and reported by tensor
            values = self.packed(tensor)
        if values.itemsize < 4 and np.isfinite(tensor).all() and np.isinf(self.read(values.tobytes())).any():
            raise CodecError(f"{name!r} has a value beyond {self.largest:g} of {self.name}; use fp32")
        return values.reshape(-1).view(np.uint8).data

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """Split the payload by the schema's shapes; fp32 tensors are read-only views of it.

        Raises:
            CodecError: The payload is not exactly as long as the schema says.
        """
        expected = self.encoded_size(schema)
        if len(payload) != expected:
            raise CodecError(f"payload has {len(payload)} bytes; {self.name} under this schema needs {expected}")
        values = self.read(payload)
        tensors: dict[str, Array] = {}
        offset = 0
        for spec in schema.tensors:
            part = values[offset : offset + spec.size]
            tensors[spec.name] = part.astype(np.float32, copy=False).reshape(spec.shape)
            offset += spec.size
        return tensors


@dataclass(frozen=True)
class FP32(Dense):
    """Each value in IEEE-754 single precision, little-endian: exact."""

    name = "fp32"
    dtype = "<f4"
    traits = CodecTraits(unbiased=True, linear=True, max_error=0.0, mean_error=0.0)


@dataclass(frozen=True)
class FP16(Dense):
    """Each value in IEEE-754 half precision, little-endian, rounded to the nearest; none beyond 65504."""

    name = "fp16"
    dtype = "<f2"
    traits = CodecTraits(unbiased=False, linear=False, max_error=2.0**-11, mean_error=2.0**-22)


@dataclass(frozen=True)
class BF16(Dense):
    """The upper half of each value in IEEE-754 single precision, little-endian, rounded to the nearest, ties to even.

    It has the range of fp32 and 8 bits of precision.
    """

    name = "bf16"
    dtype = "<u2"
    traits = CodecTraits(unbiased=False, linear=False, max_error=2.0**-8, mean_error=2.0**-16)

    @property
    def largest(self) -> float:
        """Largest finite value of the format."""
        return 2.0**127 * (2 - 2.0**-7)

    def packed(self, values: Array) -> npt.NDArray[Any]:
        """The upper halves, 16 bits each."""
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        rounded = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        # Of what is not a number only the fraction tells it from infinity, and rounding could carry it away.
        return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")

    def read(self, payload: bytes) -> Array:
        """The values, float32."""
        return (np.frombuffer(payload, "<u2").astype("<u4") << 16).view("<f4")
