"""What a coordinator inside Flower and a site's resident trainer tell each other: a JSON head, and a payload's bytes.

Flower and the ClientApp carry both without looking inside. The payload is what our codec made, as over gRPC.
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from fedloom.core.errors import ProtocolError
from fedloom.core.limits import MAX_SCHEMA_BYTES, MAX_SPEC_BYTES
from fedloom.proto.checks import checked_assignment, checked_header, checked_joined
from fedloom.proto.messages import Assignment, Joined, UpdateHeader

__all__ = [
    "MAX_HEAD_BYTES",
    "Reply",
    "Request",
    "reply_from_json",
    "reply_to_json",
    "request_from_json",
    "request_to_json",
]

MAX_HEAD_BYTES = 2 * (MAX_SPEC_BYTES + MAX_SCHEMA_BYTES) + (64 << 10)
"""Longest head: a run's spec and schema are strings in it, whose quotes are escaped."""

Fields = TypeVar("Fields")

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

_Natural = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Request:
    """What a site is asked. Every request says which run it belongs to: its reader may have started a moment ago."""

    joined: Joined
    assignment: Assignment | None = None
    """One round's work, whose broadcast is the payload; None asks the site to get ready and to declare its size."""
    over: bool = False
    """Whether the run is over, and nothing of it will be asked for again."""


@dataclass(frozen=True)
class Reply:
    """What a site answers."""

    client: str
    """The name in the site's policy; empty when it could not be read."""
    declared_examples: int = 0
    header: UpdateHeader | None = None
    """What precedes the update, which is the payload; None where no work was asked."""
    refusal: str = ""
    """Kind of the error that kept the site from it; its text stays there, since it may name files."""


@checked(config=_STRICT)
class _Joined:
    run: str
    epoch: _Natural
    spec: str
    schema: str
    schema_digest: str


@checked(config=_STRICT)
class _Assignment:
    round: _Natural
    train: list[str]
    personal: list[str]
    rank: _Natural
    base_rank: _Natural
    local: dict[str, float]
    broadcast_roles: list[str]
    broadcast_codec: str
    broadcast_digest: str
    broadcast_bytes: _Natural
    upload_codec: str


@checked(config=_STRICT)
class _Header:
    client: str
    round: _Natural
    schema_digest: str
    codec: str
    payload_bytes: _Natural
    digest: str
    attempt: _Natural
    score: list[float]


@checked(config=_STRICT)
class _Request:
    joined: _Joined
    assignment: _Assignment | None
    over: bool


@checked(config=_STRICT)
class _Reply:
    client: Annotated[str, Field(max_length=256)]
    declared_examples: _Natural
    header: _Header | None
    refusal: Annotated[str, Field(max_length=64)]


_REQUEST, _REPLY = TypeAdapter(_Request), TypeAdapter(_Reply)


def request_to_json(request: Request) -> bytes:
    """The head of a request."""
    joined, work = request.joined, request.assignment
    schema = joined.schema
    told = _Joined(joined.run, joined.epoch, joined.spec.model_dump_json(), schema.to_json(), schema.digest)
    return _REQUEST.dump_json(_Request(told, None if work is None else _assignment(work), request.over))


def request_from_json(head: bytes) -> Request:
    """A request.

    Raises:
        ProtocolError: It is not one, or holds what no honest coordinator sends.
        ConfigError: The run's spec is not one.
        SchemaError: The schema is not one.
        CodecError: It names an unknown codec.
    """
    fields = _parsed(_REQUEST, head, "request")
    work = fields.assignment
    return Request(checked_joined(fields.joined), None if work is None else checked_assignment(work), fields.over)


def reply_to_json(reply: Reply) -> bytes:
    """The head of a reply."""
    header = None
    if (sent := reply.header) is not None:
        about = sent.client, sent.round, sent.schema_digest, sent.codec, sent.payload_bytes, sent.digest
        header = _Header(*about, sent.attempt, list(sent.score))
    return _REPLY.dump_json(_Reply(reply.client, reply.declared_examples, header, reply.refusal))


def reply_from_json(head: bytes) -> Reply:
    """A reply.

    Raises:
        ProtocolError: It is not one, or holds what no honest site sends.
        CodecError: It names an unknown codec.
    """
    fields = _parsed(_REPLY, head, "reply")
    header = None if fields.header is None else checked_header(fields.header)
    return Reply(fields.client, fields.declared_examples, header, fields.refusal)


def _assignment(work: Assignment) -> _Assignment:
    return _Assignment(
        round=work.round,
        train=sorted(work.train),
        personal=sorted(work.personal),
        rank=work.rank or 0,
        base_rank=work.base_rank,
        local=dict(work.local),
        broadcast_roles=sorted(work.broadcast_roles),
        broadcast_codec=work.broadcast_codec,
        broadcast_digest=work.broadcast_digest,
        broadcast_bytes=work.broadcast_bytes,
        upload_codec=work.upload_codec,
    )


def _parsed(adapter: TypeAdapter[Fields], head: bytes, what: str) -> Fields:
    if len(head) > MAX_HEAD_BYTES:
        raise ProtocolError(f"{what} with a head of {len(head)} bytes; at most {MAX_HEAD_BYTES} are allowed")
    try:
        return adapter.validate_json(head)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ProtocolError(
            f"{what} that is not one: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}; both sides must run "
            "compatible versions of fedloom"
        ) from None
