"""A schema's values as rows of one length, which codecs scale and turn row by row.

Values are laid end to end, role by role: those of a head need not be of the size of those of a factor. Each role is cut
into rows of 1024; what is left of it is one row more, padded with zeros to a power of two, 128 at least: a turned row
of fewer values is not random enough, and EDEN biased by up to a twentieth.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedloom.core.schema import Array, Schema, Tensors, TensorSpec

__all__ = ["ROW", "Rows", "joined", "laid", "rows", "taken"]

ROW = 1024
"""Values in a row. A float32 scale for each costs 1/32 of a bit a value."""


_LEAST = 128

_TOGETHER = 128
"""Rows that are worked on at a time: what is made of them on the way stays in a core's cache."""


@dataclass(frozen=True)
class Rows:
    """Rows that lie one behind the other.

    Args:
        start: Where they begin among all values.
        used: Values in them; what is beyond is padding.
        count: How many there are.
        width: Values in each, a power of two.
    """

    start: int
    used: int
    count: int
    width: int

    @property
    def size(self) -> int:
        """Values and padding."""
        return self.count * self.width


@lru_cache(maxsize=64)
def rows(schema: Schema) -> tuple[Rows, ...]:
    """How a schema's values are cut: for each role whole rows and what is left."""
    found, start = [], 0
    for size in _sizes(schema).values():
        count, rest = divmod(size, ROW)
        for first in range(0, count, _TOGETHER):
            few = min(_TOGETHER, count - first)
            found.append(Rows(start + first * ROW, few * ROW, few, ROW))
        if rest:
            found.append(Rows(start + size - rest, rest, 1, max(_LEAST, 1 << (rest - 1).bit_length())))
        start += size
    return tuple(found)


def joined(schema: Schema, tensors: Tensors) -> list[Array]:
    """The values of `tensors` as rows, float32, an array of shape (count, width) for each of `rows`."""
    values, found = laid(schema, tensors), []
    for part in rows(schema):
        mine = values[part.start : part.start + part.used]
        if part.used < part.size:
            mine = np.concatenate([mine, np.zeros(part.size - part.used, np.float32)])
        found.append(mine.reshape(part.count, part.width))
    return found


def laid(schema: Schema, tensors: Tensors) -> Array:
    """All values end to end, role by role, float32."""
    flat = [np.ascontiguousarray(tensors[spec.name], np.float32).reshape(-1) for spec in _laid(schema)]
    return flat[0] if len(flat) == 1 else np.concatenate([*flat, np.zeros(0, np.float32)])


def taken(schema: Schema, values: Array) -> dict[str, Array]:
    """The tensors whose values lie end to end as `laid` gives them, in the schema's order."""
    tensors, offset = {spec.name: values for spec in schema.tensors}, 0
    for spec in _laid(schema):
        tensors[spec.name] = values[offset : offset + spec.size].reshape(spec.shape)
        offset += spec.size
    return tensors


def _sizes(schema: Schema) -> dict[str, int]:
    """Values of each role, in the order in which roles first come."""
    sizes: dict[str, int] = {}
    for spec in schema.tensors:
        sizes[spec.role] = sizes.get(spec.role, 0) + spec.size
    return sizes


def _laid(schema: Schema) -> list[TensorSpec]:
    """The tensors in the order in which their values lie."""
    order = {role: place for place, role in enumerate(_sizes(schema))}
    return sorted(schema.tensors, key=lambda spec: order[spec.role])
