"""What a codec is. One codec is one file; a payload's length is known before a byte of it is read."""

from dataclasses import dataclass
from typing import Protocol

from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Codec", "CodecTraits"]


@dataclass(frozen=True)
class CodecTraits:
    """What a codec says of itself; `fedloom.conformance.codecs` tests it."""

    unbiased: bool
    """The mean of a decoded value over the codec's rounding is the value."""
    linear: bool
    """What is decoded from a sum is the sum of what is decoded from its parts."""
    max_error: float
    """Largest error of one decoded value, as a share of the largest absolute value in its tensor; 0 is exact."""
    needs_state: bool = False
    """It carries something from one payload to the next, such as an error to be made up for. No engine stores that, so
    such a codec is refused."""


class Codec(Protocol):
    """Tensors to bytes and back under a schema that both sides already hold.

    A codec never reads a shape, dtype or length from the payload. The same tensors give the same bytes: a coordinator
    that resumes encodes its broadcast again. A lossy one loses only on what is already clipped and noised.
    """

    @property
    def name(self) -> str:
        """Name used in run files and on the wire."""

    @property
    def traits(self) -> CodecTraits:
        """What holds of it."""

    @property
    def largest(self) -> float:
        """Largest absolute value that can be encoded."""

    def encoded_size(self, schema: Schema) -> int:
        """Exact payload length in bytes, a pure function of the schema."""

    def encode(self, schema: Schema, tensors: Tensors) -> bytes:
        """Tensors of exactly `schema` as bytes.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A value cannot be represented.
        """

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """The float32 tensors in `payload`, which must be `encoded_size(schema)` bytes.

        Raises:
            CodecError: The length differs.
        """
