"""Updates as integers of 8 or 16 bits, so that a secure sum takes a quarter or half of the bytes.

All clients of a round turn their updates by the same random rotation, after which values are alike in size whatever
they were, and round to the same grid. Each adds a dither of its own before it rounds. Both follow from public seeds, so
the coordinator takes the sum of the dithers off the sum and turns the mean back: what is left of the error does not
depend on the values and is that of the mean of so many updates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.core.codecs.rotation import Stream, turned, turned_back
from fedloom.core.codecs.rows import ROW, laid, taken
from fedloom.core.errors import CodecError, ConfigError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.core.secagg.fixed_point import Words

__all__ = ["Lattice"]

_SPREAD = 4.0
"""Standard deviations of a turned value that the largest integer stands for. Of an update as long as is allowed, 6
values in 100,000 are cut to it; of one half as long, none."""

_LEAST_LEVELS = 3
_LEAST_WIDTH = 128


@dataclass(frozen=True)
class Lattice:
    """What every client of a run rounds its turned update to.

    The largest integer is such that `max_clients` of them add up to less than half of 2^bits: no sum wraps around.

    Args:
        bits: Of an integer, 8 or 16.
        max_norm: L2 norm of the longest update; a longer one is scaled down to it.
        max_clients: Most clients in one sum.

    Raises:
        ConfigError: So many clients leave too few levels, or `max_norm` is not positive.

    >>> Lattice(8, 1.0, 16).levels
    7
    """

    bits: int
    max_norm: float
    max_clients: int

    def __post_init__(self) -> None:
        """Refuse what would be noise."""
        if self.levels < _LEAST_LEVELS:
            most = ((1 << self.bits - 1) - 1) // _LEAST_LEVELS
            raise ConfigError(
                f"secure_aggregation.bits = {self.bits} leaves {self.levels} levels for each of "
                f"{self.max_clients} clients; set max_clients to {most} or less, or more bits"
            )
        if not 0 < self.max_norm < math.inf:
            raise ConfigError(f"secure_aggregation.max_norm = {self.max_norm}; a positive number is needed")

    @property
    def levels(self) -> int:
        """Largest integer a client sends."""
        return ((1 << self.bits - 1) - 1) // self.max_clients

    @property
    def largest(self) -> float:
        """Largest absolute value that can be encoded."""
        return self.max_norm

    def check(self, clients: int) -> None:
        """Refuse a cohort whose sum could wrap around.

        Raises:
            ConfigError: It is larger than the levels were chosen for.
        """
        if not 1 <= clients <= self.max_clients:
            raise ConfigError(
                f"a sum over {clients} clients; 1 to {self.max_clients} are allowed; raise "
                "secure_aggregation.max_clients or lower rounds.clients_per_round"
            )

    @property
    def word(self) -> str:
        """Numpy's name of the integers, modulo 2^bits."""
        return f"<u{self.bits // 8}"

    def size(self, schema: Schema) -> int:
        """Integers in an update: its values, padded."""
        rows, width = _shape(schema)
        return rows * width

    def step(self, schema: Schema) -> float:
        """Difference of neighbouring levels, in units of a value."""
        return _SPREAD * self.max_norm / (math.sqrt(self.size(schema)) * self.levels)

    def encode(self, schema: Schema, tensors: Tensors, shared: bytes, own: bytes) -> bytes:
        """An update as integers, little-endian.

        Args:
            schema: Of the update.
            tensors: Its values.
            shared: Seed of the round's rotation.
            own: Seed of this client's dither.

        Raises:
            SchemaError: Names or shapes differ from the schema.
            CodecError: A value is not finite.
        """
        schema.check(tensors)
        values = laid(schema, tensors).astype(np.float64)
        length = float(np.linalg.norm(values))
        if not math.isfinite(length):
            raise CodecError("a value of the update is not finite; lower the learning rate")
        if length > self.max_norm:
            values *= self.max_norm / length
        rows, width = _shape(schema)
        # Row after row would leave the small values of one layer beside the large ones of another: each row gets some
        # of all.
        spread = np.concatenate([values, np.zeros(rows * width - len(values))]).reshape(width, rows).T
        places = turned(np.ascontiguousarray(spread), Stream(shared, 0).signs(rows * width))
        places /= width * self.step(schema)
        places -= Stream(own, 0).between((rows, width))
        levels = np.rint(places).clip(-self.levels, self.levels)
        return levels.astype(f"<i{self.bits // 8}").tobytes()

    def mean(self, schema: Schema, total: Words, shared: bytes, owns: Sequence[bytes]) -> dict[str, Array]:
        """The mean change behind the sum of updates, float32, by the schema's names.

        Args:
            schema: Of the updates.
            total: Their sum modulo 2^bits.
            shared: Seed of the round's rotation.
            owns: Seeds of the dithers of those in the sum.

        Raises:
            CodecError: The sum has another length.
            ConfigError: So many clients' sum could have wrapped around.
        """
        rows, width = _shape(schema)
        if total.shape != (rows * width,):
            raise CodecError(f"a sum of shape {total.shape}; the schema gives {rows * width} integers")
        self.check(len(owns))
        places = total.view(f"<i{self.bits // 8}").reshape(rows, width).astype(np.float64)
        for own in owns:
            places += Stream(own, 0).between((rows, width))
        places *= self.step(schema) / (len(owns) * width)
        values = turned_back(places, Stream(shared, 0).signs(rows * width))
        return taken(schema, values.T.reshape(-1)[: schema.size].astype(np.float32))


def _shape(schema: Schema) -> tuple[int, int]:
    """Rows and their width for all values of a schema."""
    width = min(ROW, max(_LEAST_WIDTH, 1 << max(0, schema.size - 1).bit_length()))
    return -(-schema.size // width), width
