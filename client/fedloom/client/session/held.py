"""The adapter that a client trains from: fetched whole, or followed from the one it has."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

from fedloom.client.session.api import RoundCancelled
from fedloom.client.session.payloads import reader
from fedloom.core.codecs.changes import Change, change_bytes, followed, held_digest
from fedloom.core.errors import CodecError, ProtocolError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.proto.messages import Assignment, Link, broadcast_schema

__all__ = ["Adapter", "HeldAdapter", "Leg", "Shared"]


@dataclass(frozen=True)
class Leg:
    """A payload to fetch."""

    digest: str
    size_bytes: int
    read: Callable[[Tensors, bytes], dict[str, Array]]
    """What it makes of the tensors that were there before."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and its digest, see `held_digest`; nobody writes into its arrays."""

    digest: str
    tensors: Tensors


Shared = MutableMapping[str, Adapter]
"""Adapters by digest that some client of this process holds."""


class HeldAdapter:
    """The adapter of the last round that this client was asked for, in memory; a client that restarts has none.

    Args:
        shared: Given to all clients of one process, so that they hold one copy between them, and only the first of
            them decodes it. Weak: what no client holds any more is gone.
    """

    def __init__(self, shared: Shared | None = None) -> None:
        self._shared: Shared = WeakValueDictionary() if shared is None else shared
        self._adapter = Adapter("", {})

    @property
    def digest(self) -> str:
        """The adapter's, or nothing."""
        return self._adapter.digest

    def legs(self, assignment: Assignment, schema: Schema) -> list[Leg]:
        """What has to be fetched for an assignment, one after the other; nothing where its adapter is here.

        Args:
            assignment: What is asked.
            schema: The run's.

        Raises:
            CodecError: A codec is not installed.
            ProtocolError: Under the schema a payload would have another length.
        """
        if assignment.adapter and self.digest == assignment.adapter:
            return []
        schema = broadcast_schema(schema, assignment)
        if assignment.links and assignment.links[0].before == self.digest:
            return [_step(link, schema) for link in assignment.links]
        decode = reader(assignment.broadcast_codec, schema, assignment.broadcast_bytes, "broadcast")
        return [Leg(assignment.broadcast_digest, assignment.broadcast_bytes, lambda _, payload: decode(payload))]

    def follow(self, assignment: Assignment, legs: Sequence[Leg], fetch: Callable[[str, int], bytes]) -> Tensors:
        """What the assignment starts from.

        Args:
            assignment: What is asked.
            legs: What `legs` has given for it.
            fetch: Gets a payload by digest and length.

        Raises:
            CodecError: A payload does not decode.
            RoundCancelled: A payload is not to be had any more, or it is not the adapter that was named: then nothing
                is held here, and all is fetched next time.
        """
        payloads = []
        for leg in legs:
            try:
                payloads.append(fetch(leg.digest, leg.size_bytes))
            except ProtocolError as error:
                raise RoundCancelled(f"nothing to train from: {error}") from error
        if legs and (known := self._shared.get(assignment.adapter)):
            self._adapter = known
            return known.tensors
        found = self._adapter.tensors
        for leg, payload in zip(legs, payloads, strict=True):
            found = leg.read(found, payload)
        if assignment.adapter and legs:
            self._adapter = Adapter("", {})
            if (digest := held_digest(found)) != assignment.adapter:
                raise RoundCancelled(
                    f"the adapter has digest {digest[:12]} here and {assignment.adapter[:12]} at the coordinator; the "
                    "next one is fetched whole"
                )
            self._adapter = self._shared.setdefault(digest, Adapter(digest, found))
        return found


def _step(link: Link, schema: Schema) -> Leg:
    change = Change(link.values, link.changes, link.codec)
    try:
        expected = change_bytes(schema, change)
    except CodecError as error:
        raise ProtocolError(f"the coordinator sends {error}") from error
    if link.bytes != expected:
        raise ProtocolError(f"a change of {link.bytes} bytes; the adapter's schema says {expected}")
    return Leg(link.digest, link.bytes, partial(_moved, schema, change))


def _moved(schema: Schema, change: Change, held: Tensors, payload: bytes) -> dict[str, Array]:
    return followed(schema, held, payload, change)
