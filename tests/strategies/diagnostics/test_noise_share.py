"""Noise shares against updates that are drawn as noise and signal."""

import numpy as np
import pytest

from fedloom.core.schema import LORA, Role, Schema, TensorSpec
from fedloom.strategies.api import Update
from fedloom.strategies.diagnostics.noise_share import noise_shares

SCHEMA = Schema(
    (
        TensorSpec("m.A", "m", Role.LORA_A, (4, 900)),
        TensorSpec("m.B", "m", Role.LORA_B, (800, 4)),
        TensorSpec("head", "head", Role.HEAD, (50, 40)),
    )
)
START = SCHEMA.zeros()
VARIANCES = (
    {Role.LORA_A: 0.04, Role.LORA_B: 0.04, Role.HEAD: 1.0},
    {Role.LORA_A: 0.25, Role.LORA_B: 0.25, Role.HEAD: 0.09},
)


def drawn(signal: float) -> list[Update]:
    draw = np.random.default_rng(5)
    return [
        Update(
            f"c{index}",
            weight,
            START,
            {
                spec.name: (signal + draw.normal(0, np.sqrt(variance[spec.role]), spec.shape)).astype(np.float32)
                for spec in SCHEMA.tensors
            },
        )
        for index, (weight, variance) in enumerate(zip((3.0, 1.0), VARIANCES, strict=True))
    ]


def test_noise_alone_is_all_of_it() -> None:
    found = noise_shares(SCHEMA, drawn(0.0), VARIANCES)

    assert (found.mean, *found.clients, *found.layers.values()) == pytest.approx([1.0] * 5, rel=0.08)
    assert list(found.layers) == ["head", "m"]


def test_signal_takes_its_part_and_averaging_takes_noise_away() -> None:
    found = noise_shares(SCHEMA, drawn(0.3), VARIANCES)

    # Of the mean with parts 3/4 and 1/4, value by value.
    noise = {"m": 0.75**2 * 0.04 + 0.25**2 * 0.25, "head": 0.75**2 * 1.0 + 0.25**2 * 0.09}
    for module, each in noise.items():
        assert found.layers[module] == pytest.approx(each / (each + 0.09), rel=0.05)
    assert found.clients[1] == pytest.approx(
        (6800 * 0.25 + 2000 * 0.09) / (6800 * (0.25 + 0.09) + 2000 * (0.09 + 0.09)), rel=0.05
    )


def test_what_did_not_move_has_no_share() -> None:
    updates = [Update("c0", 1.0, START, SCHEMA.select(LORA).zeros())]

    found = noise_shares(SCHEMA, updates, VARIANCES[:1])

    assert (found.mean, dict(found.layers), found.clients) == (0.0, {"m": 0.0}, (0.0,))
