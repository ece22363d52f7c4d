"""Ways to change sound inputs where their structure is, so that they get past the first check."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import tomli_w
from google.protobuf.message import Message

__all__ = ["as_json", "as_toml", "bent", "garbled", "of_bytes", "of_messages", "sized", "twisted"]

DIGEST = "ab" * 32
UGLY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, -0.0, 5e-324, float("nan"), float("inf"),
    "", "a", "\0", "é", "x" * 300, "../../etc", "lora_A", [], {}, [[]], {"": None}, ["a"] * 50, [1, [2, [3]]],
)  # fmt: skip
BYTES: tuple[bytes, ...] = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\x80" * 12,
    b"\n",
    b"{}",
    b"[" * 300,
    b"\xf0\x9f\x92\xa9",
    bytes(64),
)


def ugly(rng: random.Random) -> Any:
    """A value that is seldom what is wanted, and that nobody else holds."""
    return copy.deepcopy(rng.choice(UGLY))


def garbled(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three changes that know nothing of what they mean."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.choice(BYTES)
            case 1:
                del data[at : at + rng.choice((1, 2, 7, 10**6))]
            case 2 if at < len(data):
                data[at] = rng.randrange(256)
            case 3 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 4:
                data[at : at + 4] = data[rng.randrange(len(data) + 1) :][: rng.randint(0, 9)]
    return bytes(data)


def bent(tree: Any, rng: random.Random) -> Any:
    """A copy of a document with one to three values changed, added, renamed or dropped anywhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        spots: list[tuple[Any, Any]] = []
        walk = [tree]
        while walk:
            node = walk.pop()
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                spots.append((node, key))
                walk.append(node[key])
        if not spots:
            return ugly(rng)
        node, key = rng.choice(spots)
        match rng.randrange(6):
            case 0 | 1:
                node[key] = ugly(rng)
            case 2:
                other, there = rng.choice(spots)
                node[key] = copy.deepcopy(other[there])
            case 3:
                del node[key]
            case 4 if isinstance(node, dict):
                node[rng.choice((f"{key}x", "", "version"))] = ugly(rng)
            case 5 if isinstance(node[key], int | float):
                node[key] = node[key] * rng.choice((-1, 0, 2, 1e9)) + rng.choice((0, 1))
    return tree


def twisted(message: Message, rng: random.Random) -> bytes:
    """A message with one to three fields set to something else of their type, or with its bytes changed."""
    message = type(message).FromString(message.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        owner: Any = message  # the stubs do not know what a descriptor holds
        field = rng.choice(owner.DESCRIPTOR.fields)
        while field.message_type and not field.message_type.GetOptions().map_entry and rng.random() < 0.9:
            inner = getattr(owner, field.name)
            if isinstance(inner, Message):
                owner = inner
                owner.SetInParent()
            else:  # repeated: one that is there, or a new one
                owner = rng.choice(inner) if inner and rng.random() < 0.8 else inner.add()
            if not owner.DESCRIPTOR.fields:
                break
            field = rng.choice(owner.DESCRIPTOR.fields)
        try:
            value = rng.choice((ugly(rng), ugly(rng), DIGEST, b"k" * 160, *BYTES[:3]))
            if rng.random() < 0.3:
                owner.ClearField(field.name)
            elif field.message_type:
                getattr(owner, field.name)[rng.choice(("momentum", "x" * 300, ""))] = value
            elif isinstance(getattr(owner, field.name), str | bytes | int | float | bool):
                setattr(owner, field.name, value)
            else:
                getattr(owner, field.name).extend([value] * rng.choice((1, 2000)))
        except (TypeError, ValueError, AttributeError, OverflowError):
            continue  # not of the field's type: nothing a peer could have sent
    sent = message.SerializeToString()
    return garbled(sent, rng) if rng.random() < 0.2 else sent


def as_json(text: str) -> Callable[[random.Random], bytes]:
    """A document changed as JSON, or as bytes."""
    tree = json.loads(text)

    def make(rng: random.Random) -> bytes:
        compact = json.dumps(bent(tree, rng), separators=(",", ":")).encode()
        return compact if rng.random() < 0.8 else garbled(rng.choice((compact, text.encode())), rng)

    return make


def as_toml(tables: dict[str, Any]) -> Callable[[random.Random], bytes]:
    """A file of tables changed as tables, or as bytes."""

    def make(rng: random.Random) -> bytes:
        try:
            text = tomli_w.dumps(bent(tables, rng)).encode()
        except (TypeError, AttributeError, ValueError, UnicodeEncodeError):
            text = tomli_w.dumps(tables).encode()
            return garbled(text, rng)
        return text if rng.random() < 0.8 else garbled(text, rng)

    return make


def of_bytes(*contents: bytes) -> Callable[[random.Random], bytes]:
    """One of some contents, changed as bytes."""
    return lambda rng: garbled(rng.choice(contents), rng)


def of_messages(*messages: Message) -> Callable[[random.Random], bytes]:
    """One of some messages, changed as such."""
    return lambda rng: twisted(rng.choice(messages), rng)


def sized(content: bytes) -> Callable[[random.Random], bytes]:
    """Of the right length three times in four: a wrong one is refused at once."""

    def make(rng: random.Random) -> bytes:
        changed = garbled(content, rng)
        return changed if rng.random() < 0.25 else (changed + content)[: len(content)]

    return make
