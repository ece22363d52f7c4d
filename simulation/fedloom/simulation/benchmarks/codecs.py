"""What codecs lose and what they cost, each measured in turn with copying the same values."""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedloom.core.codecs import Codec, codec
from fedloom.core.registry import entries
from fedloom.core.schema import Role, Schema, TensorSpec

__all__ = ["bench_codecs"]

_WIDTH = 4096


def bench_codecs(*, parameters: int, repeats: int, clients: int) -> list[dict[str, Any]]:
    """Encode and decode normal values under every codec that is installed.

    Args:
        parameters: Values of the adapter, at least 1.
        repeats: How often each is measured; the median counts.
        clients: Of a round, whose updates a coordinator takes one after another.

    Returns:
        For each codec: bits a value, scales and all; error: squared error over squared length, floor: the least that
        an unbiased one has at these bits, 1 / (4^bits - 1), stated: what the codec says; encode and decode: seconds
        over those of a copy of the float32 values; round: seconds in which a coordinator checks, decodes and measures
        the updates of all clients, over those for float32.
    """
    rows, rest = divmod(parameters, _WIDTH)
    shapes = [("b", (rows, _WIDTH))] * bool(rows) + [("rest", (rest,))] * bool(rest)
    schema = Schema(tuple(TensorSpec(name, name, Role.BIAS, shape) for name, shape in shapes))
    draw = np.random.default_rng(0)
    values = {spec.name: draw.standard_normal(spec.shape, np.float32) for spec in schema.tensors}
    found = [_measured(codec(name), schema, values, repeats, clients) for name in entries("codecs")]
    exact_s = next(each["round_s"] for each in found if codec(each["codec"]).traits.mean_error == 0)
    for each in found:
        each["round"] = each.pop("round_s") / exact_s
    return found


def _measured(which: Codec, schema: Schema, values: dict[str, Any], repeats: int, clients: int) -> dict[str, Any]:
    payload = which.encode(schema, values)
    decoded = which.decode(schema, payload)
    lost = sum(float(np.square(decoded[n] - v, dtype=np.float64).sum()) for n, v in values.items())
    length = sum(float(np.square(v, dtype=np.float64).sum()) for v in values.values())
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: [each.copy() for each in values.values()],
        "encode": lambda: which.encode(schema, values),
        "decode": lambda: which.decode(schema, payload),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            began_s = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began_s)
    middle = {name: float(np.median(each)) for name, each in seconds.items()}
    bits = 8 * len(payload) / schema.size
    return {
        "codec": which.name,
        "bits": bits,
        "error": lost / length,
        "floor": 1 / (4**bits - 1),
        "stated": which.traits.mean_error,
        "encode": middle["encode"] / middle["copy"],
        "decode": middle["decode"] / middle["copy"],
        "round_s": _round_s(which, schema, payload, clients),
    }


def _round_s(which: Codec, schema: Schema, payload: bytes, clients: int) -> float:
    """What a coordinator does to each update before it counts: digest, values, length."""
    began_s = time.perf_counter()
    for _ in range(clients):
        hashlib.sha256(payload).hexdigest()
        for each in which.decode(schema, payload).values():
            float(np.vdot(each, each))
    return time.perf_counter() - began_s
