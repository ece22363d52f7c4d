"""What a codec is. One codec is one file; a payload's length is known before a byte of it is read."""

from typing import Protocol

from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Codec"]


class Codec(Protocol):
    """Tensors to bytes and back under a schema that both sides already hold.

    A codec never reads a shape, dtype or length from the payload.
    """

    @property
    def name(self) -> str:
        """Name used in run files and on the wire."""

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
