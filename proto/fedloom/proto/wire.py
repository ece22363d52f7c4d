"""Messages to protobuf and back. Everything read from a peer is checked, see `checks`, before anything uses it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

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
from fedloom.proto.checks import MAX_RETRY_S
from fedloom.proto.message_codec import checked, plain
from fedloom.proto.messages import Answer, Assignment, Finished, StepResult, UpdateHeader, Wait
from fedloom.proto.v1 import federation_pb2 as pb

__all__ = [
    "RETRY_AFTER",
    "STATUS",
    "answer_from_wire",
    "answer_to_wire",
    "from_wire",
    "header_from_wire",
    "header_to_wire",
    "overloaded",
    "result_from_wire",
    "result_to_wire",
    "to_wire",
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

_ANSWERS: dict[str, type[Answer]] = {"assignment": Assignment, "wait": Wait, "finished": Finished}
"""What each field of WorkReply holds."""

M = TypeVar("M")
P = TypeVar("P", bound=Message)


def to_wire(kind: type[P], message: object, **address: Any) -> P:
    """A message as protobuf of this kind, with the fields that address it: run, epoch and client."""
    return kind(**plain(message), **address)


def from_wire(kind: type[M], message: Message) -> M:
    """A message of this kind from protobuf.

    Raises:
        ProtocolError: A field is none that an honest peer sends.
        CodecError: One names an unknown codec.
        ConfigError: The run's spec is not one.
        SchemaError: The schema is not one.
    """
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]  # every message is a dataclass
    return checked(kind, {name: _plain(getattr(message, name)) for name in names})


def answer_to_wire(answer: Answer) -> pb.WorkReply:
    """The answer to Work as protobuf."""
    (name,) = (name for name, kind in _ANSWERS.items() if isinstance(answer, kind))
    return pb.WorkReply(**{name: plain(answer)})


def answer_from_wire(reply: pb.WorkReply) -> Answer:
    """The answer to Work.

    Raises:
        ProtocolError: It carries no answer this build knows, or a field is out of range.
        CodecError: It names an unknown codec.
    """
    name = reply.WhichOneof("answer")
    if name not in _ANSWERS:
        raise ProtocolError("work reply carries no answer; the coordinator speaks another version, upgrade the client")
    return from_wire(_ANSWERS[name], getattr(reply, name))


def header_to_wire(header: UpdateHeader, run: str, epoch: int, offset: int = 0) -> pb.UpdateHeader:
    """An update's header as protobuf, addressed to one run and epoch; its payload follows from `offset` on."""
    return to_wire(pb.UpdateHeader, header, run=run, epoch=epoch, offset=offset)


def header_from_wire(message: pb.UpdateHeader) -> tuple[UpdateHeader, str, int]:
    """An update's header, with the run and the epoch it is addressed to.

    Raises:
        ProtocolError: A digest is not 64 hexadecimal digits, or the length, the offset or a figure is out of range.
        CodecError: It names an unknown codec.
    """
    if message.offset > message.payload_bytes:
        raise ProtocolError(f"offset {message.offset} lies beyond the payload of {message.payload_bytes} bytes")
    return from_wire(UpdateHeader, message), message.run, message.epoch


def result_to_wire(result: StepResult | None) -> pb.ExchangeReply:
    """What a step has given; None says that it is not closed."""
    return pb.ExchangeReply(waiting=True) if result is None else to_wire(pb.ExchangeReply, result)


def result_from_wire(reply: pb.ExchangeReply) -> StepResult | None:
    """What a step has given; None when it is not closed.

    Raises:
        ProtocolError: It has parts that no step has.
    """
    return None if reply.waiting else from_wire(StepResult, reply)


def overloaded(text: str, retry_after_ms: str) -> Overloaded:
    """The error behind a call that was refused for now; a time that is not one counts as a second.

    >>> overloaded("busy", "250").retry_after_s
    0.25
    >>> overloaded("busy", "-1").retry_after_s
    1.0
    """
    waits = retry_after_ms.isascii() and retry_after_ms.isdecimal() and len(retry_after_ms) < 10
    return Overloaded(text, min(int(retry_after_ms) / 1e3, MAX_RETRY_S) if waits else 1.0)


def _plain(value: Any) -> Any:
    """A field's value as Python's own types: protobuf's lists and maps are its own."""
    if isinstance(value, Message):
        return {each.name: _plain(getattr(value, each.name)) for each in value.DESCRIPTOR.fields}
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
