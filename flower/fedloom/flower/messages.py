"""What a coordinator inside Flower and a site's resident trainer tell each other: a JSON head, and a payload's bytes.

Flower and the ClientApp carry both without looking inside. The payload is what our codec made, as over gRPC.
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field, with_config

from fedloom.core.errors import ProtocolError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_SCHEMA_BYTES, MAX_SPEC_BYTES
from fedloom.proto.checks import STRICT, HeldDigest, Natural
from fedloom.proto.message_codec import from_json
from fedloom.proto.messages import Assignment, Joined, UpdateHeader

__all__ = ["MAX_HEAD_BYTES", "Reply", "Request", "from_head"]

MAX_HEAD_BYTES = 2 * (MAX_SPEC_BYTES + MAX_SCHEMA_BYTES) + (64 << 10)
"""Longest head: a run's spec and schema are strings in it, whose quotes are escaped."""

M = TypeVar("M")


@with_config(STRICT)
@dataclass(frozen=True)
class Request:
    """What a site is asked. Every request says which run it belongs to: its reader may have started a moment ago."""

    joined: Joined
    assignment: Assignment | None = None
    """One round's work; None asks the site to get ready and to declare its size. The payload is its broadcast, or what
    its links have, one after the other."""
    over: bool = False
    """Whether the run is over, and nothing of it will be asked for again."""


@with_config(STRICT)
@dataclass(frozen=True)
class Reply:
    """What a site answers."""

    client: Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
    """The name in the site's policy; empty when it could not be read."""
    declared_examples: Natural = 0
    header: UpdateHeader | None = None
    """What precedes the update, which is the payload; None where no work was asked."""
    held: HeldDigest = ""
    """Digest of the adapter that the site has now; empty for none."""
    refusal: Annotated[str, Field(max_length=64)] = ""
    """Kind of the error that kept the site from it; its text stays there, since it may name files."""


def from_head(kind: type[M], head: bytes) -> M:
    """A request or a reply from its head.

    Raises:
        ProtocolError: It is not one, or holds what no honest peer sends.
        ConfigError: The run's spec is not one.
        SchemaError: The schema is not one.
        CodecError: It names an unknown codec.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise ProtocolError(f"{kind.__name__} with a head of {len(head)} bytes; at most {MAX_HEAD_BYTES} are allowed")
    return from_json(kind, head)
