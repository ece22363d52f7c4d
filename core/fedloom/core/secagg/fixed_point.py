"""Updates as integers with one public step, so that sums are exact and masks can hide them."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import CodecError, ConfigError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["FixedPoint", "Words", "words"]

Words = npt.NDArray[np.unsignedinteger[Any]]
"""Integers modulo a power of two, of 8, 16 or 32 bits; negative numbers are in two's complement."""

_HALF = 1 << 31


def words(payload: bytes, word: str) -> Words:
    """The words in a payload, a read-only view of it.

    Args:
        payload: Little-endian.
        word: Numpy's name of them, such as "<u4".

    Raises:
        CodecError: It is no whole number of words.
    """
    size = np.dtype(word).itemsize
    if len(payload) % size:
        raise CodecError(f"a payload of {len(payload)} bytes is no whole number of {size}-byte words")
    found: Words = np.frombuffer(payload, word)
    return found


@dataclass(frozen=True)
class FixedPoint:
    """What every client of a run rounds its update to: integers modulo 2^32, value by value.

    The step is as fine as `max_clients` allows: that many values of `max_change` still add up to less than 2^31, so
    no sum of such a cohort can wrap around, whatever its members send within the range.

    Args:
        max_change: Largest absolute change of one value that can be sent.
        max_clients: Most clients in one sum.

    Raises:
        ConfigError: A sum could overflow or the step would not be a normal number.

    >>> FixedPoint(4.0, 256).step == 4.0 / 8388607
    True
    """

    max_change: float
    max_clients: int

    def __post_init__(self) -> None:
        """Refuse what could overflow."""
        if not 1 <= self.max_clients < _HALF:
            raise ConfigError(f"max_clients = {self.max_clients}; 1 to {_HALF - 1} values of a 32-bit sum are possible")
        if not (0 < self.max_change < math.inf and self.step > sys.float_info.min):
            raise ConfigError(f"max_change = {self.max_change}; a positive finite number is needed")

    @property
    def word(self) -> str:
        """Numpy's name of the integers."""
        return "<u4"

    def size(self, schema: Schema) -> int:
        """Integers in an update: one for each value."""
        return schema.size

    @property
    def levels(self) -> int:
        """Largest integer a client sends: max_clients times this is below 2^31."""
        return (_HALF - 1) // self.max_clients

    @property
    def step(self) -> float:
        """Difference of neighbouring values. Rounding moves a value, and a mean of values, by at most half of it."""
        return self.max_change / self.levels

    @property
    def largest(self) -> float:
        """Largest absolute value that can be encoded."""
        return self.max_change

    def check(self, clients: int) -> None:
        """Refuse a cohort whose sum could overflow.

        Raises:
            ConfigError: It is larger than the step was chosen for.
        """
        if not 1 <= clients <= self.max_clients:
            raise ConfigError(
                f"a sum over {clients} clients; the run's step allows 1 to {self.max_clients}; "
                "raise secure_aggregation.max_clients or lower rounds.clients_per_round"
            )

    def encode(self, schema: Schema, tensors: Tensors, shared: bytes = b"", own: bytes = b"") -> bytes:
        """Every value as a multiple of the step, to nearest, in schema order; no seed is needed.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A value is beyond `max_change`, NaN or infinite.
        """
        schema.check(tensors)
        flat = np.empty(schema.size, "<i4")
        offset, per_step = 0, 1 / self.step
        for spec in schema.tensors:
            tensor, part = tensors[spec.name], flat[offset : offset + spec.size]
            # A comparison with NaN is false, so this also refuses NaN and Inf.
            if spec.size and not (tensor.max() <= self.max_change and tensor.min() >= -self.max_change):
                raise CodecError(
                    f"{spec.name!r} changed by {float(np.abs(tensor).max()):g}; secure_aggregation.max_change = "
                    f"{self.max_change:g} is the most that can be sent, raise it for the run or lower the learning rate"
                )
            scaled = np.multiply(np.ravel(tensor), per_step, dtype=np.float64)
            part[:] = np.rint(scaled, out=scaled)
            offset += spec.size
        return flat.tobytes()

    def mean(self, schema: Schema, total: Words, shared: bytes, owns: Sequence[bytes]) -> dict[str, Array]:
        """The mean change behind the sum of as many updates as `owns` has seeds, float32, by the schema's names.

        Raises:
            CodecError: The sum has another length.
            ConfigError: So many clients' sum could have overflowed.
        """
        self.check(len(owns))
        if total.shape != (schema.size,):
            raise CodecError(f"a sum of shape {total.shape}; the schema has {schema.size} values")
        # The total stays below 2^31 in size, so reading it as signed undoes the reduction modulo 2^32.
        values = total.view(np.int32) * (self.step / len(owns))
        tensors: dict[str, Array] = {}
        offset = 0
        for spec in schema.tensors:
            tensors[spec.name] = values[offset : offset + spec.size].astype(np.float32).reshape(spec.shape)
            offset += spec.size
        return tensors
