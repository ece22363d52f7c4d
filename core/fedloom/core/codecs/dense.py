"""Plain little-endian values, all tensors in schema order with nothing between them: fp32 and fp16."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.core.codecs.api import CodecTraits
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["FP16", "FP32", "Dense"]


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

    def encoded_size(self, schema: Schema) -> int:
        """Number of values times the width of one."""
        return schema.size * np.dtype(self.dtype).itemsize

    def encode(self, schema: Schema, tensors: Tensors) -> bytes:
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
            values = np.ascontiguousarray(tensor, self.dtype)
        if values.itemsize < 4 and np.isinf(values).any() and np.isfinite(tensor).all():
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
        values = np.frombuffer(payload, self.dtype)
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
    traits = CodecTraits(unbiased=True, linear=True, max_error=0.0)


@dataclass(frozen=True)
class FP16(Dense):
    """Each value in IEEE-754 half precision, little-endian, rounded to the nearest; none beyond 65504."""

    name = "fp16"
    dtype = "<f2"
    traits = CodecTraits(unbiased=False, linear=False, max_error=2.0**-11)
