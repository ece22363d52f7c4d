"""How many bytes a round takes, both ways, for each strategy under each codec: every message as it goes out."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from google.protobuf.message import Message

from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.codecs.rows import rows
from fedloom.core.config.run import RunConfig
from fedloom.core.registry import entries
from fedloom.core.schema import Schema
from fedloom.proto.frames import CHUNK_FIELD, DATA_FIELD, frames
from fedloom.proto.messages import Assignment, UpdateHeader
from fedloom.proto.v1 import federation_pb2 as pb
from fedloom.proto.wire import answer_to_wire, header_to_wire
from fedloom.server.build import build_strategy
from fedloom.server.rounds.broadcast import Broadcasts
from fedloom.strategies.api import Strategy
from fedloom.strategies.start import starting_adapter

__all__ = ["bench_wire"]

_ROUNDS = 4
_CLIENT = "client-0"
_ADDRESS: dict[str, Any] = {"run": "0" * 32, "epoch": 1, "client": _CLIENT}
_FRAMING = 1024
"""Bytes a round each way that are no payload's, and are not counted as overhead."""


def bench_wire(schema: Schema, strategies: Iterable[str] = ("fedavg", "ffa", "fedsvd")) -> list[dict[str, Any]]:
    """Four rounds of one client, whose update is noise; nothing is trained.

    Args:
        schema: Of the adapter.
        strategies: Names of linear ones.

    Returns:
        For each strategy and codec: up and down, bytes of the messages of the last round; whole, bytes of the
        broadcast that a client gets that has no adapter yet; values_up and values_down, tensors' values that are sent
        under the codec; overhead_percent, the larger of up and down over bits times values, scales and 1 KiB.
    """
    return [_measured(schema, strategy, name) for strategy in strategies for name in entries("codecs")]


def _measured(schema: Schema, strategy: str, name: str) -> dict[str, Any]:
    config = RunConfig.model_validate(
        {
            "run": {"name": "wire", "rounds": _ROUNDS},
            "model": {"base": "none", "labels": ["a", "b"]},
            "train": {"steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": {"enabled": False},
            "strategy": {"name": strategy},
            "wire": {"upload": name, "broadcast": name},
        }
    )
    made: Strategy = build_strategy(config)
    state, held, whole = made.init(schema, starting_adapter(schema, 0), 0), "", 0
    draw, up, down, uploaded, coded = np.random.default_rng(0), 0, 0, schema, 0
    for round in range(_ROUNDS):
        broadcasts = Broadcasts(config, schema, made, state)
        asked = broadcasts.asked(_CLIENT, held)
        payloads = [link.digest for link in asked.links] or [asked.broadcast_digest]
        down = _down(asked, held, [broadcasts.payload(_CLIENT, digest) or b"" for digest in payloads])
        whole = whole or asked.broadcast_bytes
        coded = sum(schema.select(link.changes | link.values).size for link in asked.links)
        uploaded = broadcasts.upload_schema(_CLIENT)
        delta = {spec.name: draw.normal(0, 0.01, spec.shape).astype(np.float32) for spec in uploaded.tensors}
        body = codec(name).encode(uploaded, delta, seed_of(0, round, _CLIENT))
        up = _up(asked, uploaded, body)
        update = broadcasts.update(_CLIENT, 1.0, codec(name).decode(uploaded, body), {})
        state, held = made.commit(state, made.fold(state, None, update)), asked.adapter
    ideal = [_least(name, uploaded, uploaded.size), _least(name, uploaded, coded)]
    over = max(up / ideal[0], down / ideal[1]) if coded else up / ideal[0]
    return {
        "strategy": strategy,
        "codec": name,
        "up": up,
        "down": down,
        "whole": whole,
        "values_up": uploaded.size,
        "values_down": coded,
        "overhead_percent": max(0.0, 100 * (over - 1)),
    }


def _down(asked: Assignment, held: str, payloads: list[bytes]) -> int:
    """Bytes of what a client asks and hears until it has the adapter."""
    told = [pb.WorkRequest(held=held, **_ADDRESS), answer_to_wire(asked)]
    told += [pb.FetchRequest(digest=hashlib.sha256(each).hexdigest(), **_ADDRESS) for each in payloads]
    return _size(told) + sum(len(frame) for each in payloads for frame in frames(CHUNK_FIELD, each))


def _up(asked: Assignment, uploaded: Schema, body: bytes) -> int:
    """Bytes of what a client sends with its update, and of the answer."""
    digest = hashlib.sha256(body).hexdigest()
    header = UpdateHeader(_CLIENT, asked.round, uploaded.digest, asked.upload_codec, len(body), digest)
    first = pb.SubmitRequest(header=header_to_wire(header, _ADDRESS["run"], 1))
    return _size([first, pb.SubmitReply()]) + sum(len(frame) for frame in frames(DATA_FIELD, body))


def _size(messages: Iterable[Message]) -> int:
    return sum(message.ByteSize() for message in messages)


def _least(name: str, schema: Schema, values: int) -> float:
    """Bits times values, a scale for each row, and the framing that is granted, in bytes."""
    bits = 8 * codec(name).encoded_size(schema) / schema.size
    scales = 4 * sum(part.count for part in rows(schema)) if bits < 16 else 0
    return round(bits) * values / 8 + scales * values / schema.size + _FRAMING
