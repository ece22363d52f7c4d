"""Bytes on the wire do not change by accident: every message as an earlier build wrote it, and the protocol's shape.

`python tests/proto/test_golden.py` writes the files anew. Do so for a message or field that is new; where a line that
was there changes, an older peer no longer understands this one, and PROTOCOL_VERSION has to rise.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from fedloom.core.config.run import Spec
from fedloom.core.errors import ProtocolError
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.core.secagg.steps import MASKED, Step
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, framed, unframed
from fedloom.proto.messages import (
    Assignment,
    Finished,
    Joined,
    Link,
    RoundStatus,
    StepMessage,
    StepResult,
    UpdateHeader,
    Wait,
)
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import (
    answer_from_wire,
    answer_to_wire,
    from_wire,
    header_from_wire,
    header_to_wire,
    result_from_wire,
    result_to_wire,
    to_wire,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TRANSCRIPT, SHAPE = GOLDEN / "messages.json", GOLDEN / "descriptor.json"

DIGEST, OTHER = "ab" * 32, "cd" * 32
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (2, 3)), TensorSpec("m.B", "m", Role.LORA_B, (4, 2))), 2.0)
SPEC_TEXT = (
    '{"run":{"name":"trial","rounds":3},"model":{"base":"tiny","labels":["no","yes"]},'
    '"train":{"steps":5,"sampling_rate":0.1,"learning_rate":0.5}}'
)
JOINED = Joined("4f", 3, Spec.from_json(SPEC_TEXT), SCHEMA)
ORDER = Assignment(
    round=7,
    train=frozenset({Role.LORA_B, Role.HEAD}),
    broadcast_roles=frozenset({Role.LORA_A, Role.LORA_B, Role.BASE_A, Role.BASE_B}),
    broadcast_digest=DIGEST,
    broadcast_bytes=1234,
    broadcast_codec="fp16",
    upload_codec="fp32",
    personal=frozenset({Role.HEAD}),
    rank=2,
    base_rank=16,
    local={"learning_rate": 0.25},
)
LINEAR_ORDER = replace(ORDER, linear=frozenset({Role.LORA_B}))
ORDER_IN_TURNS = replace(ORDER, train=ORDER.train | {Role.LORA_A}, turns=(Role.LORA_B, Role.LORA_A))
LINK = Link(OTHER, DIGEST, frozenset({"m.A"}), frozenset({"m.B"}), "fp16", "ef" * 32, 40)
ORDER_WITH_LINKS = replace(ORDER, adapter=DIGEST, links=(LINK,))
HEADER = UpdateHeader("ward-3", 7, DIGEST, "fp16", 24, OTHER)
SCORED_HEADER = replace(HEADER, score=(120.5, -3.25, 40.0))
MASKED_HEADER = UpdateHeader("ward-3", 7, DIGEST, MASKED, 24, OTHER, attempt=2)
ADDRESS: dict[str, Any] = {"run": "4f", "epoch": 3, "client": "ward-3"}
STEP = StepMessage(7, Step.SHARE, {"ann": b"sealed"}, 2)
STEP_RESULT = StepResult(2, {"ben": b"sealed"})


def join_reply() -> pb.JoinReply:
    """The spec as an earlier build wrote it: a later one has more keys, with defaults, and must read this."""
    reply = to_wire(pb.JoinReply, JOINED)
    reply.spec = SPEC_TEXT
    return reply


MESSAGES: dict[str, Message] = {
    "JoinRequest": pb.JoinRequest(client="ward-3", protocol=1, declared_examples=3000),
    "JoinReply": join_reply(),
    "WorkRequest": pb.WorkRequest(**ADDRESS),
    "WorkReply assignment": answer_to_wire(ORDER),
    "WorkReply wait": answer_to_wire(Wait(1.5)),
    "WorkReply finished": answer_to_wire(Finished(9, "fp32", DIGEST, 56)),
    "FetchRequest": pb.FetchRequest(digest=DIGEST, offset=1 << 20, **ADDRESS),
    "Chunk": pb.Chunk(data=b"payload"),
    "SubmitRequest header": pb.SubmitRequest(header=header_to_wire(HEADER, "4f", 3)),
    "SubmitRequest masked header": pb.SubmitRequest(header=header_to_wire(MASKED_HEADER, "4f", 3)),
    "SubmitRequest header that goes on": pb.SubmitRequest(header=header_to_wire(HEADER, "4f", 3, 16)),
    "SubmitRequest header with figures": pb.SubmitRequest(header=header_to_wire(SCORED_HEADER, "4f", 3)),
    "SubmitRequest data": pb.SubmitRequest(data=b"payload"),
    "SubmitReply": pb.SubmitReply(),
    "SubmitReply duplicate": pb.SubmitReply(duplicate=True),
    "SubmitReply missing": pb.SubmitReply(missing_bytes=8),
    "ExchangeRequest": to_wire(pb.ExchangeRequest, STEP, client="ward-3", run="4f", epoch=3),
    "ExchangeReply": result_to_wire(STEP_RESULT),
    "ExchangeReply waiting": result_to_wire(None),
    "HeartbeatRequest": pb.HeartbeatRequest(**ADDRESS),
    "HeartbeatReply": pb.HeartbeatReply(round=7, open=True),
    "HeartbeatReply oldest": to_wire(pb.HeartbeatReply, RoundStatus(7, True, 3)),
    "LeaveRequest": pb.LeaveRequest(reason="run over", **ADDRESS),
    "LeaveReply": pb.LeaveReply(),
    "EnrollRequest": pb.EnrollRequest(signing_request=b"request"),
    "EnrollReply": pb.EnrollReply(certificate=b"certificate"),
    "StatusRequest": pb.StatusRequest(),
    "StatusReply": pb.StatusReply(
        run="4f",
        epoch=3,
        round=7,
        rounds=9,
        open=True,
        elapsed_s=1.5,
        needed=2,
        short=True,
        live=["ann", "ben"],
        cohort=["ann", "ben", "eve"],
        submitted=["ann"],
        lost={"eve": "lease"},
    ),
    "StopRequest": pb.StopRequest(),
    "StopReply": pb.StopReply(),
    "FinishRequest": pb.FinishRequest(),
    "FinishReply": pb.FinishReply(),
    "StatusReply waiting": pb.StatusReply(
        run="4f", waiting="round 2 waits", waiting_s=9.0, refusing=["eve"], over=True
    ),
    "WorkReply finished, corrected": answer_to_wire(Finished(9, "fp32", DIGEST, 56, 3)),
    "WorkReply assignment, linear": answer_to_wire(LINEAR_ORDER),
    "WorkReply assignment in turns": answer_to_wire(ORDER_IN_TURNS),
    "WorkReply assignment with links": answer_to_wire(ORDER_WITH_LINKS),
    "WorkRequest held": pb.WorkRequest(held=DIGEST, **ADDRESS),
}
"""One message of each kind, named by its type and what tells it from others of the type."""

READ: dict[str, tuple[Callable[[Any], object], object]] = {
    "JoinReply": (partial(from_wire, Joined), JOINED),
    "WorkReply assignment": (answer_from_wire, ORDER),
    "WorkReply assignment, linear": (answer_from_wire, LINEAR_ORDER),
    "WorkReply assignment in turns": (answer_from_wire, ORDER_IN_TURNS),
    "WorkReply assignment with links": (answer_from_wire, ORDER_WITH_LINKS),
    "WorkReply wait": (answer_from_wire, Wait(1.5)),
    "WorkReply finished": (answer_from_wire, Finished(9, "fp32", DIGEST, 56)),
    "SubmitRequest header": (lambda message: header_from_wire(message.header), (HEADER, "4f", 3)),
    "SubmitRequest masked header": (lambda message: header_from_wire(message.header), (MASKED_HEADER, "4f", 3)),
    "SubmitRequest header that goes on": (lambda message: message.header.offset, 16),
    "SubmitRequest header with figures": (lambda message: header_from_wire(message.header), (SCORED_HEADER, "4f", 3)),
    "SubmitReply missing": (lambda message: message.missing_bytes, 8),
    "ExchangeRequest": (partial(from_wire, StepMessage), STEP),
    "ExchangeReply": (result_from_wire, STEP_RESULT),
    "ExchangeReply waiting": (result_from_wire, None),
    "HeartbeatReply": (partial(from_wire, RoundStatus), RoundStatus(7, True, 0)),
    "HeartbeatReply oldest": (partial(from_wire, RoundStatus), RoundStatus(7, True, 3)),
}
"""What this build makes of the bytes, where it makes more of them than protobuf does."""


def kind(name: str) -> type[Message]:
    found: type[Message] = getattr(pb, name.split()[0])
    return found


def transcript() -> dict[str, str]:
    return {name: message.SerializeToString(deterministic=True).hex() for name, message in MESSAGES.items()}


def shape() -> dict[str, str]:
    """Every message's fields, every enum's values and every method, by full name."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    found: dict[str, str] = {}

    def walk(prefix: str, message: descriptor_pb2.DescriptorProto) -> None:
        name = f"{prefix}.{message.name}"
        for field in message.field:
            label = "repeated " if field.label == field.LABEL_REPEATED else ""
            what = field.type_name or descriptor_pb2.FieldDescriptorProto.Type.Name(field.type)[5:].lower()
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            found[f"{name} {field.number}"] = f"{label}{what} {field.name}{f' of {oneof}' if oneof else ''}"
        for nested in message.nested_type:
            walk(name, nested)

    for message in file.message_type:
        walk(file.package, message)
    for enum in file.enum_type:
        found |= {f"{file.package}.{enum.name} {value.number}": value.name for value in enum.value}
    for service in file.service:
        for method in service.method:
            ask = ("stream " if method.client_streaming else "") + method.input_type
            give = ("stream " if method.server_streaming else "") + method.output_type
            found[f"{file.package}.{service.name}.{method.name}"] = f"{ask} -> {give}"
    return found


def golden(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_every_message_of_the_protocol_is_in_the_transcript() -> None:
    """But for those that stand in another one."""
    inner = {"Assignment", "Link", "Wait", "Finished", "UpdateHeader"}

    assert {name.split()[0] for name in MESSAGES} == set(pb.DESCRIPTOR.message_types_by_name) - inner


@pytest.mark.parametrize("name", MESSAGES)
def test_this_build_writes_what_was_written(name: str) -> None:
    assert transcript()[name] == golden(TRANSCRIPT)[name]


@pytest.mark.parametrize("name", golden(TRANSCRIPT) if TRANSCRIPT.is_file() else [])
def test_this_build_reads_what_was_written(name: str) -> None:
    sent = bytes.fromhex(golden(TRANSCRIPT)[name])
    message = kind(name).FromString(sent)

    assert message == MESSAGES[name]
    if name in READ:
        read, expected = READ[name]
        assert read(message) == expected


@pytest.mark.parametrize(("name", "field"), [("Chunk", CHUNK_FIELD), ("SubmitRequest data", DATA_FIELD)])
def test_payloads_framed_by_hand_are_in_the_transcript(name: str, field: int) -> None:
    sent = bytes.fromhex(golden(TRANSCRIPT)[name])

    assert framed(field, b"payload") == sent
    assert bytes(unframed(field, sent)) == b"payload"


def with_unknown_fields(sent: bytes) -> bytes:
    """The message as a later build would send it: with a number and a text in fields that this one has not got."""
    number, text = 1000 << 3, 1001 << 3 | 2
    return sent + varint(number) + b"\x07" + varint(text) + b"\x05later"


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


@pytest.mark.parametrize("name", READ)
def test_fields_of_a_later_build_are_passed_over(name: str) -> None:
    read, expected = READ[name]
    sent = with_unknown_fields(MESSAGES[name].SerializeToString())

    message = kind(name).FromString(sent)

    assert len(message.SerializeToString()) > len(MESSAGES[name].SerializeToString())
    assert read(message) == expected


def test_an_answer_or_a_step_of_a_later_build_is_refused_in_plain_words() -> None:
    with pytest.raises(ProtocolError, match="speaks another version, upgrade the client"):
        answer_from_wire(pb.WorkReply.FromString(with_unknown_fields(b"")))
    later = pb.ExchangeRequest(**ADDRESS)
    later.step = 99  # type: ignore[assignment]  # an enum is open on the wire
    with pytest.raises(ProtocolError, match="step 99 of a secure sum; 1 to 5 are known"):
        from_wire(StepMessage, pb.ExchangeRequest.FromString(later.SerializeToString()))


def broken(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """What a peer that knows the earlier shape would misunderstand."""
    for name, what in before.items():
        if now.get(name) != what:
            yield f"{name}: {what} became {now.get(name, 'nothing')}"


def test_no_field_is_removed_renumbered_or_changed() -> None:
    assert list(broken(golden(SHAPE), shape())) == []


def test_new_fields_are_in_the_snapshot_too() -> None:
    """Otherwise the next change to them would pass."""
    assert shape().keys() == golden(SHAPE).keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fedloom.v1.Chunk 1": None}, "bytes data became nothing"),
        ({"fedloom.v1.Chunk 1": "string data"}, "bytes data became string data"),
        ({"fedloom.v1.SubmitReply 3": "uint64 more"}, None),
    ],
)
def test_a_break_would_be_seen(change: dict[str, str | None], said: str | None) -> None:
    now = {name: what for name, what in {**shape(), **change}.items() if what is not None}

    found = list(broken(golden(SHAPE), now))

    assert [each.partition(": ")[2] for each in found] == ([said] if said else [])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for target, content in ((TRANSCRIPT, transcript()), (SHAPE, shape())):
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
