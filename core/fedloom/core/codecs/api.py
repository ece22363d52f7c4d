"""What a codec is. One codec is one file; a payload's length is known before a byte of it is read."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["NO_SEED", "SEED_BYTES", "Codec", "CodecTraits", "seed_of"]

SEED_BYTES = 16

NO_SEED = bytes(SEED_BYTES)
"""Where nothing random matters."""


def seed_of(*address: object) -> bytes:
    """A seed for the payload with this address, such as run seed, round and client."""
    return hashlib.sha256("\0".join(map(str, address)).encode()).digest()[:SEED_BYTES]


@dataclass(frozen=True)
class CodecTraits:
    """What a codec says of itself; `fedloom.conformance.codecs` tests it. One of the two errors must be stated.

    Raises:
        ConfigError: Neither is.
    """

    unbiased: bool
    """The mean of a decoded value over the codec's rounding is the value, to 2^-14 of the largest in its tensor."""
    linear: bool
    """What is decoded from a sum is the sum of what is decoded from its parts."""
    max_error: float | None = None
    """Largest error of one decoded value, as a share of the largest absolute value in its tensor; 0 is exact."""
    mean_error: float | None = None
    """Expected squared length of the error of an update over the squared length of the update. Noise of variance s^2 in
    each value has s^2 (1 + mean_error) once it is decoded."""
    feedback: bool = False
    """What a payload leaves out is to be added to the next one: the client keeps it (error feedback)."""

    def __post_init__(self) -> None:
        """Refuse a codec that says nothing of its error."""
        if self.max_error is None and self.mean_error is None:
            raise ConfigError("a codec states its max_error, its mean_error, or both")


class Codec(Protocol):
    """Tensors to bytes and back under a schema that both sides already hold.

    A codec never reads a shape, dtype or length from the payload. The same tensors and seed give the same bytes: a
    coordinator that resumes encodes its broadcast again. A lossy one loses only on what is already clipped and noised.
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

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        """Tensors of exactly `schema` as bytes.

        Args:
            schema: What is encoded.
            tensors: Its values.
            seed: 16 bytes, others for each payload, from which whatever is random comes. It knows nothing of the
                values, and a codec that needs it to decode puts it into the payload.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A value cannot be represented.
        """

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        """The float32 tensors in `payload`, which must be `encoded_size(schema)` bytes.

        Raises:
            CodecError: The length differs.
        """
