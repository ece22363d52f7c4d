"""Each message is declared once: whatever field is added to it travels over both carriers, checked."""

import json
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
from google.protobuf.message import Message

from fedloom.core.errors import ProtocolError
from fedloom.core.secagg.steps import MASKED
from fedloom.flower.messages import Reply, Request
from fedloom.proto.message_codec import from_json, to_json
from fedloom.proto.messages import Finished, Joined, RoundStatus, Wait
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import from_wire, to_wire
from tests.proto.test_golden import (
    DIGEST,
    JOINED,
    LINEAR_ORDER,
    LINK,
    MASKED_HEADER,
    ORDER_IN_TURNS,
    STEP,
    STEP_RESULT,
)

ASSIGNMENT = replace(LINEAR_ORDER, upload_codec=MASKED, turns=ORDER_IN_TURNS.turns, adapter=DIGEST, links=(LINK,))
HEADER = replace(MASKED_HEADER, score=(1.5, -2.0))
OF_BOTH: tuple[tuple[object, type[Message], frozenset[str]], ...] = (
    (JOINED, pb.JoinReply, frozenset()),
    (ASSIGNMENT, pb.Assignment, frozenset()),
    (Wait(1.5), pb.Wait, frozenset()),
    (Finished(9, "fp32", DIGEST, 56, 3), pb.Finished, frozenset()),
    (RoundStatus(7, True, 3), pb.HeartbeatReply, frozenset()),
    (HEADER, pb.UpdateHeader, frozenset({"run", "epoch", "offset"})),
)
OF_GRPC: tuple[tuple[object, type[Message], frozenset[str]], ...] = (
    (STEP, pb.ExchangeRequest, frozenset({"run", "epoch", "client"})),
    (STEP_RESULT, pb.ExchangeReply, frozenset({"waiting"})),
)
OF_FLOWER = (Request(JOINED, ASSIGNMENT, True), Reply("ward-3", 40, HEADER, DIGEST, "refused"))
"""Messages in which every field has another value than its default, with the protobuf field beside them."""


def named(value: object) -> str:
    return type(value).__name__ if not isinstance(value, type | frozenset) else ""


def check_full(message: Any) -> None:
    for each in fields(message):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        assert getattr(message, each.name) != default, f"give {each.name} another value than its default here"


@pytest.mark.parametrize(("message", "kind", "address"), OF_BOTH + OF_GRPC, ids=named)
def test_every_field_travels_in_protobuf(message: Any, kind: type[Message], address: frozenset[str]) -> None:
    check_full(message)

    assert {each.name for each in kind.DESCRIPTOR.fields} - address == {each.name for each in fields(message)}
    assert from_wire(type(message), kind.FromString(to_wire(kind, message).SerializeToString())) == message


@pytest.mark.parametrize("message", [each for each, _, _ in OF_BOTH] + list(OF_FLOWER), ids=named)
def test_every_field_travels_in_json(message: Any) -> None:
    check_full(message)

    sent = to_json(message)

    assert json.loads(sent).keys() == {each.name for each in fields(message)}
    assert from_json(type(message), sent) == message


@pytest.mark.parametrize("message", [each for each, _, _ in OF_BOTH] + list(OF_FLOWER), ids=named)
def test_no_declaration_lets_a_stranger_or_another_type_in(message: Any) -> None:
    """However a field is declared, a text is no number, a number no bool and NaN no number."""
    sent = json.loads(to_json(message))
    with pytest.raises(ProtocolError, match="surprise"):
        from_json(type(message), json.dumps({**sent, "surprise": 1}).encode())
    for name, value in sent.items():
        wrong: dict[type, list[Any]] = {
            str: [5, None],
            bool: [1, "true"],
            int: [True, "5", 1.5, -1],
            float: ["1.5", float("nan")],
        }
        for other in wrong.get(type(value), [5, "text", {"a": []}]):
            with pytest.raises(ProtocolError):
                from_json(type(message), json.dumps({**sent, name: other}).encode())


def test_a_schema_must_come_with_its_own_digest() -> None:
    assert JOINED.schema_digest == JOINED.schema.digest
    sent = json.loads(to_json(JOINED))
    del sent["schema_digest"]

    with pytest.raises(ProtocolError, match="the coordinator says ''; both sides must run compatible versions"):
        from_json(Joined, json.dumps(sent).encode())
