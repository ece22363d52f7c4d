"""Messages to protobuf and back. Everything read from a peer is checked, see `checks`, before anything uses it."""

from collections.abc import Mapping

from fedloom.core.codecs import installed
from fedloom.core.errors import (
    BudgetError,
    CodecError,
    ConfigError,
    DataError,
    FedloomError,
    Forbidden,
    IdentityError,
    LedgerError,
    ModelError,
    Overloaded,
    PolicyError,
    ProtocolError,
    SchemaError,
    StoreError,
    StrategyError,
    Unavailable,
    UpdateRejected,
)
from fedloom.core.limits import MAX_NAME_LENGTH
from fedloom.core.secagg.keys import ADVERT_BYTES
from fedloom.core.secagg.steps import Step, StepMessage, StepResult
from fedloom.proto.checks import checked_assignment, checked_digest, checked_header, checked_joined, checked_size
from fedloom.proto.messages import Answer, Assignment, Finished, Joined, RoundStatus, UpdateHeader, Wait
from fedloom.proto.v1 import federation_pb2 as pb

__all__ = [
    "RETRY_AFTER",
    "STATUS",
    "answer_from_wire",
    "answer_to_wire",
    "header_from_wire",
    "header_to_wire",
    "joined_from_wire",
    "joined_to_wire",
    "overloaded",
    "result_from_wire",
    "result_to_wire",
    "standing_from_wire",
    "standing_to_wire",
    "step_from_wire",
    "step_to_wire",
]

STATUS: dict[type[FedloomError], str] = {
    FedloomError: "INTERNAL",
    ConfigError: "INVALID_ARGUMENT",
    DataError: "INVALID_ARGUMENT",
    ModelError: "INVALID_ARGUMENT",
    SchemaError: "INVALID_ARGUMENT",
    CodecError: "INVALID_ARGUMENT",
    UpdateRejected: "OUT_OF_RANGE",
    PolicyError: "PERMISSION_DENIED",
    BudgetError: "PERMISSION_DENIED",
    LedgerError: "DATA_LOSS",
    ProtocolError: "FAILED_PRECONDITION",
    IdentityError: "UNAUTHENTICATED",
    Forbidden: "PERMISSION_DENIED",
    Unavailable: "UNAVAILABLE",
    Overloaded: "RESOURCE_EXHAUSTED",
    StoreError: "INTERNAL",
    StrategyError: "INTERNAL",
}
"""Name of the gRPC status that carries each error. A client may read FAILED_PRECONDITION as ProtocolError (join
again), OUT_OF_RANGE as UpdateRejected (do not send these bytes again), INVALID_ARGUMENT as ConfigError,
UNAUTHENTICATED as IdentityError and PERMISSION_DENIED as Forbidden; it retries UNAVAILABLE, and RESOURCE_EXHAUSTED when
RETRY_AFTER comes with it."""

RETRY_AFTER = "retry-after-ms"
"""Key of the trailing metadata that says after how many milliseconds a call refused as Overloaded may be repeated."""

_MAX_RETRY_S = 3600.0
_MAX_PARTS = 1000


def joined_to_wire(joined: Joined) -> pb.JoinReply:
    """The answer to Join as protobuf."""
    return pb.JoinReply(
        run=joined.run,
        epoch=joined.epoch,
        spec=joined.spec.model_dump_json(),
        schema=joined.schema.to_json(),
        schema_digest=joined.schema.digest,
    )


def joined_from_wire(reply: pb.JoinReply) -> Joined:
    """The answer to Join, with the spec and the schema parsed and the schema's digest recomputed.

    Raises:
        ProtocolError: The run or the epoch is missing, or the schema's digest differs.
        ConfigError: The spec is not one.
        SchemaError: The schema is not one.
    """
    return checked_joined(reply)


def answer_to_wire(answer: Answer) -> pb.WorkReply:
    """The answer to Work as protobuf."""
    match answer:
        case Assignment():
            return pb.WorkReply(assignment=_assignment_to_wire(answer))
        case Wait(retry_after_s):
            return pb.WorkReply(wait=pb.Wait(retry_after_s=retry_after_s))
        case Finished(rounds, name, digest, size, rank):
            final = pb.Finished(rounds=rounds, codec=name, digest=digest, bytes=size, base_rank=rank)
            return pb.WorkReply(finished=final)


def answer_from_wire(reply: pb.WorkReply) -> Answer:
    """The answer to Work.

    Raises:
        ProtocolError: It carries no answer this build knows, or a field is out of range.
        CodecError: It names an unknown codec.
    """
    match reply.WhichOneof("answer"):
        case "assignment":
            return checked_assignment(reply.assignment)
        case "wait":
            retry_after_s = reply.wait.retry_after_s
            if not 0 <= retry_after_s <= _MAX_RETRY_S:
                raise ProtocolError(f"wait of {retry_after_s} s; 0 to {_MAX_RETRY_S:g} s allowed")
            return Wait(retry_after_s)
        case "finished":
            final = reply.finished
            return Finished(
                final.rounds,
                installed(final.codec),
                checked_digest(final.digest, "final adapter"),
                checked_size(final.bytes),
                final.base_rank,
            )
    raise ProtocolError("work reply carries no answer; the coordinator speaks another version, upgrade the client")


def header_to_wire(header: UpdateHeader, run: str, epoch: int, offset: int = 0) -> pb.UpdateHeader:
    """An update's header as protobuf, addressed to one run and epoch; its payload follows from `offset` on."""
    return pb.UpdateHeader(
        run=run,
        epoch=epoch,
        client=header.client,
        round=header.round,
        schema_digest=header.schema_digest,
        codec=header.codec,
        payload_bytes=header.payload_bytes,
        digest=header.digest,
        attempt=header.attempt,
        offset=offset,
        score=header.score,
    )


def header_from_wire(message: pb.UpdateHeader) -> tuple[UpdateHeader, str, int]:
    """An update's header, with the run and the epoch it is addressed to.

    Raises:
        ProtocolError: A digest is not 64 hexadecimal digits, or the length, the offset or a figure is out of range.
        CodecError: It names an unknown codec.
    """
    if message.offset > message.payload_bytes:
        raise ProtocolError(f"offset {message.offset} lies beyond the payload of {message.payload_bytes} bytes")
    return checked_header(message), message.run, message.epoch


def standing_to_wire(standing: RoundStatus) -> pb.HeartbeatReply:
    """The answer to Heartbeat as protobuf."""
    return pb.HeartbeatReply(round=standing.round, open=standing.open, oldest=standing.oldest)


def standing_from_wire(reply: pb.HeartbeatReply) -> RoundStatus:
    """The answer to Heartbeat.

    Raises:
        ProtocolError: The oldest round that is taken comes after the one that is open.
    """
    if reply.oldest > reply.round:
        raise ProtocolError(f"updates are taken from round {reply.oldest} on, but round {reply.round} is open or next")
    return RoundStatus(reply.round, reply.open, reply.oldest)


def overloaded(text: str, retry_after_ms: str) -> Overloaded:
    """The error behind a call that was refused for now; a time that is not one counts as a second.

    >>> overloaded("busy", "250").retry_after_s
    0.25
    >>> overloaded("busy", "-1").retry_after_s
    1.0
    """
    waits = retry_after_ms.isascii() and retry_after_ms.isdecimal() and len(retry_after_ms) < 10
    return Overloaded(text, min(int(retry_after_ms) / 1e3, _MAX_RETRY_S) if waits else 1.0)


def step_to_wire(message: StepMessage, client: str, run: str, epoch: int) -> pb.ExchangeRequest:
    """One client's message in a step of a secure sum, addressed to one run and epoch."""
    return pb.ExchangeRequest(
        run=run,
        epoch=epoch,
        client=client,
        round=message.round,
        attempt=message.attempt,
        step=f"STEP_{message.step.name}",
        parts=message.parts,
    )


def step_from_wire(request: pb.ExchangeRequest) -> StepMessage:
    """One client's message in a step of a secure sum.

    Raises:
        ProtocolError: There is no such step, or it has parts that no step has.
    """
    try:
        step = Step(request.step)
    except ValueError:
        raise ProtocolError(f"step {request.step} of a secure sum; 1 to {max(Step)} are known") from None
    return StepMessage(request.round, step, _parts(request.parts), request.attempt)


def result_to_wire(result: StepResult | None) -> pb.ExchangeReply:
    """What a step has given; None says that it is not closed."""
    if result is None:
        return pb.ExchangeReply(waiting=True)
    return pb.ExchangeReply(attempt=result.attempt, parts=result.parts)


def result_from_wire(reply: pb.ExchangeReply) -> StepResult | None:
    """What a step has given; None when it is not closed.

    Raises:
        ProtocolError: It has parts that no step has.
    """
    return None if reply.waiting else StepResult(reply.attempt, _parts(reply.parts))


def _parts(parts: Mapping[str, bytes]) -> dict[str, bytes]:
    if len(parts) > _MAX_PARTS or any(
        len(name) > MAX_NAME_LENGTH or len(part) > ADVERT_BYTES for name, part in parts.items()
    ):
        raise ProtocolError(
            f"a step of a secure sum with {len(parts)} parts; at most {_MAX_PARTS} of {ADVERT_BYTES} bytes are allowed"
        )
    return dict(parts)


def _assignment_to_wire(assignment: Assignment) -> pb.Assignment:
    return pb.Assignment(
        round=assignment.round,
        train=sorted(assignment.train),
        personal=sorted(assignment.personal),
        rank=assignment.rank or 0,
        base_rank=assignment.base_rank,
        local=dict(assignment.local),
        broadcast_roles=sorted(assignment.broadcast_roles),
        broadcast_codec=assignment.broadcast_codec,
        broadcast_digest=assignment.broadcast_digest,
        broadcast_bytes=assignment.broadcast_bytes,
        upload_codec=assignment.upload_codec,
    )
