"""What must hold of a message from a peer, whatever carried it: protobuf over gRPC, or JSON inside another framework.

A name, number or digest that no honest peer would send is a `ProtocolError`. Whether a message fits the
state of the run (right round, right client, right length) is for the coordinator and the client to say.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from pydantic import ValidationError

from fedloom.core.codecs import installed
from fedloom.core.config.parsing import explain
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.errors import ProtocolError
from fedloom.core.limits import MAX_NAME_LENGTH, MAX_PAYLOAD_BYTES, MAX_RANK, MAX_ROUNDS, MAX_TENSORS
from fedloom.core.schema import Schema
from fedloom.core.secagg.steps import MASKED
from fedloom.proto.messages import Assignment, Joined, UpdateHeader

__all__ = [
    "LOCAL_NAMES",
    "AssignmentFields",
    "HeaderFields",
    "JoinedFields",
    "checked_assignment",
    "checked_digest",
    "checked_header",
    "checked_joined",
    "checked_size",
    "overridden",
]

LOCAL_NAMES = frozenset({"learning_rate", "momentum", "proximal_mu"})
"""Local hyper-parameters an assignment may change. Nothing that the privacy account depends on is here."""

_ANY_RUN = TrainSection(steps=1, sampling_rate=1.0, learning_rate=1.0)
"""A [train] to check overrides against before it is known which run they are for."""

_MOST_FIGURES, _LARGEST_FIGURE = 5, 1e12

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class JoinedFields(Protocol):
    """The answer to Join as it came, of the right types and nothing more."""

    run: str
    epoch: int
    spec: str
    schema: str
    schema_digest: str


class AssignmentFields(Protocol):
    """An assignment as it came, of the right types and nothing more; a rank of 0 is the schema's."""

    round: int
    rank: int
    base_rank: int
    broadcast_codec: str
    broadcast_digest: str
    broadcast_bytes: int
    upload_codec: str

    @property
    def train(self) -> Iterable[str]:
        """Roles and names of tensors."""

    @property
    def personal(self) -> Iterable[str]:
        """Roles and names of tensors."""

    @property
    def broadcast_roles(self) -> Iterable[str]:
        """Roles and names of tensors."""

    @property
    def local(self) -> Mapping[str, float]:
        """Local hyper-parameters by name."""


class HeaderFields(Protocol):
    """An update's header as it came, of the right types and nothing more."""

    client: str
    round: int
    schema_digest: str
    codec: str
    payload_bytes: int
    digest: str
    attempt: int

    @property
    def score(self) -> Sequence[float]:
        """Figures of an evaluation."""


def checked_joined(fields: JoinedFields) -> Joined:
    """The answer to Join, with the spec and the schema parsed and the schema's digest recomputed.

    Raises:
        ProtocolError: The run or the epoch is missing, or the schema's digest differs.
        ConfigError: The spec is not one.
        SchemaError: The schema is not one.
    """
    if not 0 < len(fields.run) <= MAX_NAME_LENGTH or not fields.run.isprintable() or fields.epoch < 1:
        raise ProtocolError(
            f"join reply names run {fields.run[:64]!r}, epoch {fields.epoch}; both are needed, the name printable"
        )
    schema = Schema.from_json(fields.schema)
    if schema.digest != fields.schema_digest:
        raise ProtocolError(
            f"the schema received has digest {schema.digest[:12]}, the coordinator says {fields.schema_digest[:12]!r}; "
            "both sides must run compatible versions of fedloom"
        )
    return Joined(run=fields.run, epoch=fields.epoch, spec=Spec.from_json(fields.spec), schema=schema)


def checked_assignment(fields: AssignmentFields) -> Assignment:
    """One round's work.

    Raises:
        ProtocolError: A selection, a digest, a length, a rank, a round or a local hyper-parameter is none, or it trains
            nothing.
        CodecError: It names an unknown codec.
    """
    train, personal = _words(fields.train), _words(fields.personal)
    if not train:
        raise ProtocolError("assignment trains nothing; it must name roles or tensors")
    if not 0 <= fields.round < MAX_ROUNDS or not 0 <= fields.rank <= MAX_RANK or fields.base_rank < 0:
        raise ProtocolError(
            f"assignment for round {fields.round} at rank {fields.rank} and base rank {fields.base_rank}; a round from "
            f"0 to below {MAX_ROUNDS}, a rank of at most {MAX_RANK} and no negative number are allowed"
        )
    local = dict(fields.local)
    overridden(_ANY_RUN, local)
    return Assignment(
        round=fields.round,
        train=train,
        personal=personal,
        rank=fields.rank or None,
        base_rank=fields.base_rank,
        local=local,
        broadcast_roles=_words(fields.broadcast_roles),
        broadcast_codec=installed(fields.broadcast_codec[:MAX_NAME_LENGTH]),
        broadcast_digest=checked_digest(fields.broadcast_digest, "broadcast"),
        broadcast_bytes=checked_size(fields.broadcast_bytes),
        upload_codec=_upload_codec(fields.upload_codec),
    )


def checked_header(fields: HeaderFields) -> UpdateHeader:
    """What precedes an update's payload.

    Raises:
        ProtocolError: A digest is not 64 hexadecimal digits, or the length or a figure is out of range.
        CodecError: It names an unknown codec.
    """
    return UpdateHeader(
        client=fields.client,
        round=fields.round,
        schema_digest=checked_digest(fields.schema_digest, "schema"),
        codec=_upload_codec(fields.codec),
        payload_bytes=checked_size(fields.payload_bytes),
        digest=checked_digest(fields.digest, "update"),
        attempt=fields.attempt,
        score=_score(fields.score),
    )


def overridden(train: TrainSection, local: Mapping[str, float]) -> TrainSection:
    """[train] with what an assignment overrides for its round, in the ranges that hold for every [train].

    Raises:
        ProtocolError: A name is not among `LOCAL_NAMES`, or its value is none that a run file may have.
    """
    extra = sorted(local.keys() - LOCAL_NAMES)
    if extra:
        shown = ", ".join(name[:64] for name in extra[:3])
        raise ProtocolError(
            f"the coordinator tries to set {shown} for one round; only {', '.join(sorted(LOCAL_NAMES))} may vary"
        )
    try:
        return TrainSection.model_validate({**train.model_dump(), **local})
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        raise ProtocolError(
            f"the coordinator sets {name} to {local[name]!r} for one round; {explain(error, TrainSection)}"
        ) from error


def checked_digest(text: str, what: str) -> str:
    """A SHA-256 in lower-case hexadecimal digits.

    Raises:
        ProtocolError: It is not one.
    """
    if not _DIGEST.fullmatch(text):
        raise ProtocolError(f"{what} digest {text[:64]!r} is not 64 lower-case hexadecimal digits")
    return text


def checked_size(size_bytes: int) -> int:
    """A payload's length.

    Raises:
        ProtocolError: No payload may be so long.
    """
    if not 0 <= size_bytes <= MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"payload of {size_bytes} bytes announced; at most {MAX_PAYLOAD_BYTES} are allowed")
    return size_bytes


def _score(figures: Sequence[float]) -> tuple[float, ...]:
    """The figures of an evaluation: sums over at most as many rows as anybody may declare."""
    if len(figures) > _MOST_FIGURES or not all(abs(each) <= _LARGEST_FIGURE for each in figures):
        raise ProtocolError(
            f"update with {len(figures)} figures of an evaluation; at most {_MOST_FIGURES}, each from "
            f"-{_LARGEST_FIGURE:g} to {_LARGEST_FIGURE:g}, are allowed"
        )
    return tuple(figures)


def _upload_codec(name: str) -> str:
    """The name of a codec, or of a masked update, which no codec can read."""
    return name if name == MASKED else installed(name[:MAX_NAME_LENGTH])


def _words(words: Iterable[str]) -> frozenset[str]:
    """Roles and names of tensors. Whether the adapter has them is for whoever has its schema to say."""
    found = frozenset(words)
    if len(found) > MAX_TENSORS or any(not 0 < len(word) <= MAX_NAME_LENGTH for word in found):
        raise ProtocolError(
            f"a selection of {len(found)} roles and tensors; at most {MAX_TENSORS}, each of 1 to {MAX_NAME_LENGTH} "
            "characters, are allowed"
        )
    return found
