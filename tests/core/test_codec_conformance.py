"""All codecs pass the battery, and those that lie about themselves do not."""

from dataclasses import dataclass

import numpy as np
import pytest

from fedloom.conformance.codecs import CodecConformance
from fedloom.core.codecs import Codec, CodecTraits, codec
from fedloom.core.codecs.api import NO_SEED
from fedloom.core.codecs.dense import FP16, FP32
from fedloom.core.registry import entries
from fedloom.core.schema import Array, Schema, Tensors


@pytest.mark.parametrize("name", entries("codecs"))
class TestOurs(CodecConformance):
    """Every codec that is installed."""

    @pytest.fixture(autouse=True)
    def _named(self, name: str) -> None:
        self.name = name

    def codec(self) -> Codec:
        return codec(self.name)


@dataclass(frozen=True)
class Exact(FP16):
    """Says that it is exact."""

    traits = CodecTraits(unbiased=False, linear=False, max_error=0.0)


@dataclass(frozen=True)
class Downward(FP32):
    """Says that it is unbiased, and takes a little off."""

    traits = CodecTraits(unbiased=True, linear=False, max_error=0.01)

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        return {name: value * np.float32(0.995) for name, value in super().decode(schema, payload).items()}


@dataclass(frozen=True)
class Square(FP32):
    """Says that it is linear."""

    traits = CodecTraits(unbiased=False, linear=True, max_error=1.0)

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        return super().encode(schema, {name: value * np.abs(value) for name, value in tensors.items()})


@dataclass(frozen=True)
class Chatty(FP32):
    """Ends with a byte of its own."""

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        return super().encode(schema, tensors) + b"!"


@dataclass(frozen=True)
class Lenient(FP32):
    """Reads whatever comes, and leaves out what is missing."""

    def decode(self, schema: Schema, payload: bytes) -> dict[str, Array]:
        return super().decode(schema, payload.ljust(self.encoded_size(schema))[: self.encoded_size(schema)])


@dataclass(frozen=True)
class Tidy(FP32):
    """Makes numbers of what is none."""

    def encode(self, schema: Schema, tensors: Tensors, seed: bytes = NO_SEED) -> bytes:
        return super().encode(schema, {name: np.nan_to_num(value) for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Exact(), lambda battery: battery.test_a_round_trip_is_within_the_stated_error(1.0)),
        (Downward(), CodecConformance.test_an_unbiased_codec_has_no_bias),
        (Square(), CodecConformance.test_a_linear_codec_adds_up),
        (Chatty(), CodecConformance.test_the_length_follows_from_the_schema),
        (Lenient(), CodecConformance.test_another_length_is_refused),
        (Tidy(), CodecConformance.test_what_is_not_a_number_is_refused_or_stays_one),
    ],
)
def test_the_battery_sees_it(wrong: Codec, law: object) -> None:
    class Battery(CodecConformance):
        def codec(self) -> Codec:
            return wrong

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(Battery())  # type: ignore[operator]
