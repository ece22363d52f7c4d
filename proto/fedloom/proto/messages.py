"""What a client and a coordinator tell each other, whatever carries it: a socket, a framework or a function call.

Each message is declared once. Its fields have the names they have in the `.proto` file, and types of `checks` that say
what must hold of one that came from a peer; `message_codec` derives the rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, with_config

from fedloom.core.errors import ProtocolError
from fedloom.core.limits import MAX_LINKS
from fedloom.core.schema import Schema
from fedloom.proto.checks import (
    STRICT,
    Codec,
    Digest,
    Epoch,
    Figures,
    HeldDigest,
    LocalValues,
    Natural,
    OldestRound,
    Parts,
    Rank,
    RetryAfter,
    Round,
    SchemaDigest,
    SchemaText,
    Size,
    SpecText,
    StepNumber,
    Trained,
    Turns,
    UploadCodec,
    Words,
)

__all__ = [
    "PROTOCOL_VERSION",
    "REFUSED",
    "Answer",
    "Assignment",
    "Finished",
    "Joined",
    "Link",
    "RoundStatus",
    "StepMessage",
    "StepResult",
    "UpdateHeader",
    "Wait",
    "broadcast_schema",
    "moving",
    "upload_schema",
]

PROTOCOL_VERSION = 1
"""Version of the messages; a coordinator refuses a client that speaks another major version."""

REFUSED = "refused"
"""All that a peer hears of why a client does not take part. One word, whatever the reason: reasons are about data."""


@with_config(STRICT)
@dataclass(frozen=True)
class Joined:
    """The coordinator's answer to Join."""

    run: str
    epoch: Epoch
    spec: SpecText
    schema: SchemaText
    schema_digest: SchemaDigest = ""
    """The schema's, whatever is given here; a peer's must be the same, or the versions are not compatible."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema_digest", self.schema.digest)


@with_config(STRICT)
@dataclass(frozen=True)
class Link:
    """A step from one adapter to the next, for a client that has the first."""

    before: Digest
    after: Digest
    values: Words
    """What is sent as it is, float32, first in the payload: roles and names of tensors, see `Schema.select`."""
    changes: Words
    """What follows as its coded change."""
    codec: Codec
    digest: Digest
    bytes: Size


@with_config(STRICT)
@dataclass(frozen=True)
class Assignment:
    """One round's work for one client."""

    round: Round
    train: Trained
    """What is trained: roles and names of tensors, see `Schema.select`. So for the two below."""
    broadcast_roles: Words
    broadcast_digest: Digest
    """SHA-256 of the broadcast payload, hex; the address to fetch it by."""
    broadcast_bytes: Size
    broadcast_codec: Codec = "fp32"
    upload_codec: UploadCodec = "fp32"
    personal: Words = frozenset()
    rank: Rank = None
    base_rank: Natural = 0
    local: LocalValues = field(default_factory=dict)
    linear: Words = frozenset()
    """Tensors that the broadcast carries a term for, which is added to their gradients in every step."""
    turns: Turns = ()
    """What moves by turns, see `moving`."""
    adapter: HeldDigest = ""
    """Digest of the tensors to train from, see `held_digest`; empty where only the payload says."""
    links: Annotated[tuple[Link, ...], Field(max_length=MAX_LINKS)] = ()
    """Steps that lead there from what the client has."""


@with_config(STRICT)
@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""

    retry_after_s: RetryAfter
    """Seconds to stay away: 0 after a long poll, more in place of one."""


@with_config(STRICT)
@dataclass(frozen=True)
class Finished:
    """The run is over; the final adapter can be fetched under the whole schema."""

    rounds: Natural
    codec: Codec
    digest: Digest
    bytes: Size
    base_rank: Natural = 0
    """Rank of the correction of the frozen weights that comes with it; 0 for none."""


Answer = Assignment | Wait | Finished


@with_config(STRICT)
@dataclass(frozen=True)
class RoundStatus:
    """How the run stands, for a client that trains."""

    round: Natural
    """The round that is open or comes next."""
    open: bool
    oldest: OldestRound
    """The oldest round whose updates are still taken; `round` itself, but for buffered rounds."""


@with_config(STRICT)
@dataclass(frozen=True)
class UpdateHeader:
    """What precedes an update's payload."""

    client: str
    round: Natural
    schema_digest: Digest
    codec: UploadCodec
    payload_bytes: Size
    digest: Digest
    attempt: Natural = 0
    """Attempt of the secure sum that a masked update belongs to; 0 for others."""
    score: Figures = ()
    """What the client's evaluation of its held-out rows releases; empty where the round has none."""


@with_config(STRICT)
@dataclass(frozen=True)
class StepMessage:
    """What a client sends in one step of a secure sum. Sent again unchanged, it asks for the result."""

    round: Natural
    step: StepNumber
    parts: Parts
    attempt: Natural = 0
    """Number of the attempt, from the result of the first step; 0 in the first step, which belongs to any."""


@with_config(STRICT)
@dataclass(frozen=True)
class StepResult:
    """What a client gets once a step is closed, or that it has to begin again: then `attempt` is another."""

    attempt: Natural
    parts: Parts


def broadcast_schema(schema: Schema, assignment: Assignment) -> Schema:
    """The schema of an assignment's broadcast, derived from the run's."""
    derived = schema.with_rank(assignment.rank) if assignment.rank else schema
    if assignment.base_rank:
        derived = derived.with_base(assignment.base_rank)
    return derived.select(assignment.broadcast_roles).with_linear(assignment.linear)


def upload_schema(schema: Schema, assignment: Assignment) -> Schema:
    """The schema of the update that answers an assignment, derived from the run's."""
    derived = schema.with_rank(assignment.rank) if assignment.rank else schema
    return derived.select(assignment.train, but=assignment.personal)


def moving(schema: Schema, train: Iterable[str], turns: Sequence[str]) -> tuple[frozenset[str], ...]:
    """Names of the tensors that move in each step of a cycle: step t of a round is the one at t % its length.

    Args:
        schema: The run's.
        train: What is trained, by role or name.
        turns: What takes turns, see `Plan.turns`; without any the cycle is one step, in which everything moves.

    Raises:
        ProtocolError: A turn is of nothing that is trained.
    """
    trained = schema.select(train).names()
    taken = [schema.select((word,)).names() for word in turns]
    for word, names in zip(turns, taken, strict=True):
        if not names or not names <= trained:
            among = ", ".join(sorted(schema.words(trained)))[:200]
            raise ProtocolError(f"{word[:64]!r} is to move by turns and is not all trained; what is trained is {among}")
    always = trained.difference(*taken)
    return tuple(always | names for names in taken) or (trained,)
