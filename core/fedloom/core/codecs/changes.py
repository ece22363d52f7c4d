"""From an adapter that both sides hold to the next one: some tensors as they are, the coded change of others."""

import hashlib
from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.errors import CodecError
from fedloom.core.schema import Array, Schema, Tensors

__all__ = ["Change", "change_bytes", "changed", "followed", "held_digest"]

_EXACT = "fp32"


@dataclass(frozen=True)
class Change:
    """What is sent.

    Args:
        values: The tensors whose float32 values the payload begins with, by role or name, see `Schema.select`.
        changes: Those whose coded change follows.
        codec: Of the changes.
    """

    values: Set[str]
    changes: Set[str]
    codec: str

    def parts(self, schema: Schema) -> tuple[Schema, Schema]:
        """The schemas of both, for tensors of `schema`.

        Raises:
            CodecError: They have a tensor in common, or select what is not there.
        """
        exact, coded = schema.select(self.values), schema.select(self.changes)
        if schema.unknown(self.values | self.changes) or exact.names() & coded.names():
            what = ", ".join(sorted(self.values | self.changes))[:200]
            raise CodecError(f"a change of {what}, of which the adapter lacks some or which come twice")
        return exact, coded


def held_digest(tensors: Tensors) -> str:
    """SHA-256 of tensors by name and float32 value, hex; equal digests are equal adapters."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}\0".encode())
        total.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return total.hexdigest()


def change_bytes(schema: Schema, change: Change) -> int:
    """Exact length of the payload.

    Args:
        schema: Of all tensors that are held.
        change: What is sent.

    Raises:
        CodecError: There is no such codec, or see `Change.parts`.
    """
    exact, coded = change.parts(schema)
    return codec(_EXACT).encoded_size(exact) + codec(change.codec).encoded_size(coded)


def changed(schema: Schema, before: Tensors, wanted: Tensors, change: Change, seed: bytes) -> bytes:
    """The payload that leads from `before` toward `wanted`.

    Raises:
        CodecError: A change cannot be represented.
    """
    exact, coded = change.parts(schema)
    values = codec(_EXACT).encode(exact, {spec.name: wanted[spec.name] for spec in exact.tensors})
    moves = {spec.name: wanted[spec.name] - before[spec.name] for spec in coded.tensors}
    return values + codec(change.codec).encode(coded, moves, seed)


def followed(schema: Schema, before: Tensors, payload: bytes, change: Change) -> dict[str, Array]:
    """Where a payload leads, float32, to the last bit the same on every machine.

    Raises:
        CodecError: It has another length, or does not decode.
    """
    if len(payload) != (expected := change_bytes(schema, change)):
        raise CodecError(f"a change of {len(payload)} bytes; the adapter's schema says {expected}")
    exact, coded = change.parts(schema)
    split = codec(_EXACT).encoded_size(exact)
    values = codec(_EXACT).decode(exact, payload[:split])
    moves = codec(change.codec).decode(coded, payload[split:])
    return {
        name: values[name] if name in values else each + moves[name] if name in moves else each
        for name, each in before.items()
    }
