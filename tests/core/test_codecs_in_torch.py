"""EDEN in torch, by butterflies in place of matrix products: another order of summation, and the same bytes."""

import math

import numpy as np
import pytest
import torch

from fedloom.core.codecs.api import seed_of
from fedloom.core.codecs.eden import EDEN1, EDEN2, EDEN3, EDEN4, Eden
from fedloom.core.codecs.packing import pack
from fedloom.core.codecs.rotation import Stream
from fedloom.core.codecs.rows import joined
from fedloom.core.schema import Role, Schema, TensorSpec

SCHEMA = Schema(
    (TensorSpec("m.B", "m", Role.LORA_B, (700, 8)), TensorSpec("head", "head", Role.HEAD, (3, 100))), scale=2.0
)
SEED = seed_of("in torch")


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """The fast Walsh-Hadamard transform of each row."""
    count, width = values.shape
    half = 1
    while half < width:
        pairs = values.reshape(count, width // (2 * half), 2, half)
        values = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        values = values.reshape(count, width)
        half *= 2
    return values


def signs(stream: Stream, count: int, width: int) -> list[torch.Tensor]:
    bits = np.unpackbits(stream.signs(count * width), axis=1)
    return [torch.from_numpy(1.0 - 2.0 * each.astype(np.float32)).reshape(count, width) for each in bits]


def encoded(which: Eden, tensors: dict[str, np.ndarray]) -> bytes:
    """What `which` makes of the tensors."""
    scales, codes = [], []
    for number, rows in enumerate(joined(SCHEMA, tensors)):
        values = torch.from_numpy(np.ascontiguousarray(rows))
        width = values.shape[1]
        largest = values.abs().amax(1).double()
        per_unit = 2.0**14 / largest
        whole = (values * per_unit.float()[:, None]).round()
        first, second = signs(Stream(SEED, number), *values.shape)
        shrink = 2 ** math.ceil(math.log2(width) / 2)
        turned = hadamard(second * (hadamard(first * whole) / shrink).round())
        square = whole.double().square().sum(1) * (width / shrink) ** 2
        deviation = (square / width).sqrt().float()
        code = sum((turned.abs() > np.float32(bound) * deviation[:, None]).to(torch.int64) for bound in which.bounds)
        code = torch.as_tensor(code) + torch.zeros_like(turned, dtype=torch.int64)
        along = (torch.tensor(which.levels, dtype=torch.float64)[code] * turned.double().abs()).sum(1)
        scale = square / along / (per_unit * (width / shrink)) / width
        scales.append(scale.numpy().astype("<f4").tobytes())
        code |= torch.signbit(turned).to(torch.int64) << (which.bits - 1)
        codes.append(pack(code.numpy().astype(np.uint8), which.bits))
    return b"".join([SEED, *scales, *codes])


@pytest.mark.parametrize("which", [EDEN1(), EDEN2(), EDEN3(), EDEN4()], ids=lambda each: each.name)
def test_numpy_and_torch_make_the_same_bytes(which: Eden) -> None:
    draw = np.random.default_rng(0)
    tensors = {spec.name: draw.standard_t(3, spec.shape).astype(np.float32) for spec in SCHEMA.tensors}

    payload = which.encode(SCHEMA, tensors, SEED)

    assert encoded(which, tensors) == payload
