"""Heads there and back, and heads that no honest side sends."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedloom.core.errors import CodecError, FedloomError, ProtocolError
from fedloom.core.schema import Role
from fedloom.flower.messages import MAX_HEAD_BYTES, Reply, Request, from_head
from fedloom.proto.message_codec import to_json
from fedloom.proto.messages import UpdateHeader

HEADER = UpdateHeader("site-a", 3, "a" * 64, "fp32", 32, "b" * 64, score=(1.5, -2.0, 1e-17))


def test_a_request_comes_back_as_it_was(work: Callable[[int], Request]) -> None:
    asked = work(3)
    assert asked.assignment is not None
    full = replace(
        asked.assignment, rank=2, base_rank=1, local={"learning_rate": 0.5}, personal=frozenset({Role.LORA_A})
    )

    for request in (asked, Request(asked.joined), Request(asked.joined, over=True), Request(asked.joined, full)):
        assert from_head(Request, to_json(request)) == request


def test_a_reply_comes_back_as_it_was() -> None:
    for reply in (Reply("site-a", 40), Reply("site-a", 40, HEADER), Reply("", refusal="refused")):
        assert from_head(Reply, to_json(reply)) == reply


def edited(head: bytes, *path: str, value: Any) -> bytes:
    document = json.loads(head)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("joined", "run"), "", ProtocolError),
        (("joined", "epoch"), 0, ProtocolError),
        (("joined", "epoch"), "1", ProtocolError),
        (("joined", "schema_digest"), "0" * 64, ProtocolError),
        (("joined", "spec"), "{}", FedloomError),
        (("assignment", "round"), -1, ProtocolError),
        (("assignment", "round"), True, ProtocolError),
        (("assignment", "train"), [], ProtocolError),
        (("assignment", "train"), [""], ProtocolError),
        (("assignment", "local"), {"noise_multiplier": 0.0}, ProtocolError),
        (("assignment", "local"), {"learning_rate": -1.0}, ProtocolError),
        (("assignment", "broadcast_codec"), "pickle", CodecError),
        (("assignment", "broadcast_digest"), "../etc", ProtocolError),
        (("assignment", "broadcast_bytes"), 1 << 60, ProtocolError),
        (("assignment", "surprise"), 1, ProtocolError),
        (("over",), 1, ProtocolError),
    ],
)
def test_a_hostile_request_is_refused(
    work: Callable[[int], Request], path: tuple[str, ...], value: Any, error: type[FedloomError]
) -> None:
    head = to_json(work(0))
    from_head(Request, head)

    with pytest.raises(error):
        from_head(Request, edited(head, *path, value=value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("client",), 7),
        (("client",), "x" * 257),
        (("declared_examples",), -1),
        (("refusal",), "x" * 65),
        (("header", "digest"), "b" * 63),
        (("header", "payload_bytes"), 1 << 60),
        (("header", "round"), 1.5),
    ],
)
def test_a_hostile_reply_is_refused(path: tuple[str, ...], value: Any) -> None:
    with pytest.raises(ProtocolError):
        from_head(Reply, edited(to_json(Reply("site-a", 40, HEADER)), *path, value=value))


@pytest.mark.parametrize("head", [b"", b"\xff\xfe", b"[]", b"[" * 100_000, b" " * (MAX_HEAD_BYTES + 1)])
def test_what_is_not_a_head_is_one_clear_error(head: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"compatible versions|are allowed"):
        from_head(Request, head)
