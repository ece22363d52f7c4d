"""What a client and a coordinator tell each other, whatever carries it: a socket or a function call."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.core.config.run import Spec
from fedloom.core.schema import Schema

__all__ = [
    "PROTOCOL_VERSION",
    "REFUSED",
    "Answer",
    "Assignment",
    "Finished",
    "Joined",
    "RoundStatus",
    "UpdateHeader",
    "Wait",
    "broadcast_schema",
    "upload_schema",
]

PROTOCOL_VERSION = 1
"""Version of the messages; a coordinator refuses a client that speaks another major version."""

REFUSED = "refused"
"""All that a peer hears of why a client does not take part. One word, whatever the reason: reasons are about data."""


@dataclass(frozen=True)
class Joined:
    """The coordinator's answer to Join."""

    run: str
    epoch: int
    spec: Spec
    schema: Schema


@dataclass(frozen=True)
class Assignment:
    """One round's work for one client."""

    round: int
    train: frozenset[str]
    """What is trained: roles and names of tensors, see `Schema.select`. So for the two below."""
    broadcast_roles: frozenset[str]
    broadcast_digest: str
    """SHA-256 of the broadcast payload, hex; the address to fetch it by."""
    broadcast_bytes: int
    broadcast_codec: str = "fp32"
    upload_codec: str = "fp32"
    personal: frozenset[str] = frozenset()
    rank: int | None = None
    base_rank: int = 0
    local: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""

    retry_after_s: float
    """Seconds to stay away: 0 after a long poll, more in place of one."""


@dataclass(frozen=True)
class Finished:
    """The run is over; the final adapter can be fetched under the whole schema."""

    rounds: int
    codec: str
    digest: str
    bytes: int
    base_rank: int = 0
    """Rank of the correction of the frozen weights that comes with it; 0 for none."""


Answer = Assignment | Wait | Finished


@dataclass(frozen=True)
class RoundStatus:
    """How the run stands, for a client that trains."""

    round: int
    """The round that is open or comes next."""
    open: bool
    oldest: int
    """The oldest round whose updates are still taken; `round` itself, but for buffered rounds."""


@dataclass(frozen=True)
class UpdateHeader:
    """What precedes an update's payload."""

    client: str
    round: int
    schema_digest: str
    codec: str
    payload_bytes: int
    digest: str
    attempt: int = 0
    """Attempt of the secure sum that a masked update belongs to; 0 for others."""
    score: tuple[float, ...] = ()
    """What the client's evaluation of its held-out rows releases; empty where the round has none."""


def broadcast_schema(schema: Schema, assignment: Assignment) -> Schema:
    """The schema of an assignment's broadcast, derived from the run's."""
    derived = schema.with_rank(assignment.rank) if assignment.rank else schema
    if assignment.base_rank:
        derived = derived.with_base(assignment.base_rank)
    return derived.select(assignment.broadcast_roles)


def upload_schema(schema: Schema, assignment: Assignment) -> Schema:
    """The schema of the update that answers an assignment, derived from the run's."""
    derived = schema.with_rank(assignment.rank) if assignment.rank else schema
    return derived.select(assignment.train, but=assignment.personal)
