"""Secure sums of few bits, against what their formulas say."""

import numpy as np
import pytest

from fedloom.core.errors import CodecError, ConfigError, SchemaError
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.core.secagg.fixed_point import Words, words
from fedloom.core.secagg.lattice import Lattice

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (8, 300)), TensorSpec("m.B", "m", Role.LORA_B, (128, 8))), 2.0)
SHARED = b"s" * 16


def update(rng: np.random.Generator, length: float = 1.0) -> Tensors:
    """Large values in one tensor, small ones in the other."""
    tensors = {"m.A": rng.normal(size=(8, 300)), "m.B": 0.01 * rng.normal(size=(128, 8))}
    norm = np.sqrt(sum((each**2).sum() for each in tensors.values()))
    return {name: (each * (length / norm)).astype(np.float32) for name, each in tensors.items()}


def own(client: int, round: int = 0) -> bytes:
    return bytes([client, round]) * 8


def total(numbers: Lattice, updates: list[Tensors], round: int = 0) -> Words:
    """What the coordinator has once all masks are off: a sum modulo 2^bits."""
    found = np.zeros(numbers.size(SCHEMA), numbers.word)
    for client, each in enumerate(updates):
        found += words(numbers.encode(SCHEMA, each, SHARED, own(client, round)), numbers.word)
    return found


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensors[spec.name].ravel().astype(np.float64) for spec in SCHEMA.tensors])


@pytest.mark.parametrize(("bits", "clients"), [(8, 4), (8, 16), (16, 4), (16, 200)])
def test_the_error_of_the_mean_is_that_of_a_dithered_grid(bits: int, clients: int) -> None:
    """A dithered rounding errs evenly within half a step, so n of them have variance step^2 / 12 n (Roberts, 1962)."""
    numbers, rng = Lattice(bits, 2.0, clients), np.random.default_rng(0)
    updates = [update(rng) for _ in range(clients)]

    mean = numbers.mean(SCHEMA, total(numbers, updates), SHARED, [own(each) for each in range(clients)])

    error = flat(mean) - np.mean([flat(each) for each in updates], axis=0)
    variance = numbers.step(SCHEMA) ** 2 / (12 * clients)
    # float32 of the result rounds away what little a grid of 16 bits loses.
    rounding = (2.0**-24 * flat(mean)).var()
    assert abs(np.mean(error**2) / (variance + rounding) - 1) < 5 * np.sqrt(2 / error.size) + 0.02
    assert abs(error.mean()) < 5 * np.sqrt(variance / error.size)


def test_the_mean_over_many_rounds_is_the_mean() -> None:
    numbers, rng = Lattice(8, 2.0, 16), np.random.default_rng(1)
    updates = [update(rng) for _ in range(16)]
    exact = np.mean([flat(each) for each in updates], axis=0)
    rounds = 50

    found = [
        flat(numbers.mean(SCHEMA, total(numbers, updates, round), SHARED, [own(each, round) for each in range(16)]))
        for round in range(rounds)
    ]

    error = np.mean(found, axis=0) - exact
    assert np.mean(error**2) < 1.3 * numbers.step(SCHEMA) ** 2 / (12 * 16 * rounds)


@pytest.mark.parametrize("bits", [8, 16])
def test_no_sum_of_as_many_as_allowed_wraps_around(bits: int) -> None:
    numbers = Lattice(bits, 1.0, 16)
    longest = update(np.random.default_rng(2), length=50.0)

    found = flat(numbers.mean(SCHEMA, total(numbers, [longest] * 16), SHARED, [own(each) for each in range(16)]))

    wanted = flat(longest) / 50
    assert found @ wanted / np.linalg.norm(found) > 0.99
    assert 0.95 < np.linalg.norm(found) < 1.05, "a longer update is scaled down to max_norm"
    for client in range(16):
        sent = words(numbers.encode(SCHEMA, longest, SHARED, own(client)), numbers.word).view(f"<i{bits // 8}")
        assert np.abs(sent.astype(int)).max() <= numbers.levels
    assert 16 * numbers.levels < 2 ** (bits - 1)


def test_a_value_takes_one_byte() -> None:
    numbers = Lattice(8, 1.0, 16)

    assert len(numbers.encode(SCHEMA, update(np.random.default_rng(3)), SHARED, own(0))) == numbers.size(SCHEMA)
    assert numbers.size(SCHEMA) == 4096  # 3,424 values, in rows of 1,024


def test_bad_input_is_refused() -> None:
    numbers = Lattice(8, 1.0, 16)
    broken = dict(update(np.random.default_rng(4)))
    broken["m.B"] = np.full((128, 8), np.nan, np.float32)

    with pytest.raises(CodecError, match="not finite"):
        numbers.encode(SCHEMA, broken, SHARED, own(0))
    with pytest.raises(SchemaError):
        numbers.encode(SCHEMA, {"m.A": broken["m.B"]}, SHARED, own(0))
    with pytest.raises(CodecError, match="4096 integers"):
        numbers.mean(SCHEMA, np.zeros(3, np.uint8), SHARED, [own(0)])
    with pytest.raises(ConfigError, match="1 to 16"):
        numbers.mean(SCHEMA, np.zeros(4096, np.uint8), SHARED, [own(0)] * 17)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((8, 1.0, 43), "max_clients to 42"), ((8, 0.0, 16), "positive"), ((16, float("inf"), 16), "positive")],
)
def test_what_would_be_noise_is_refused(arguments: tuple[int, float, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lattice(*arguments)
