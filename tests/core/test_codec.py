import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.errors import CodecError, SchemaError
from fedloom.core.registry import entries
from fedloom.core.schema import Array, Role, Schema, TensorSpec

SCHEMA = Schema(
    (TensorSpec("m.lora_A", "m", Role.LORA_A, (1, 3)), TensorSpec("m.bias", "m", Role.BIAS, (2,))),
)
VALUES: dict[str, Array] = {
    "m.bias": np.array([-0.5, 65504.0], np.float32),
    "m.lora_A": np.array([[1.0, -2.0, 0.0999755859375]], np.float32),
}
# IEEE 754 by hand: tensors in schema order, values little-endian, nothing before, between or after them.
GOLDEN = {
    "fp32": "0000803f000000c000c0cc3d000000bf00e07f47",
    "fp16": "003c00c0662e00b8ff7b",
}

PINNED: dict[str, tuple[str, str]] = {
    "bf16": ("558f65090f434e45", "7ad79860b7076e12"),
    "eden1": ("973ed62e1f2112d6", "d87ec63478c0d4b5"),
    "eden2": ("3091d76f9a727992", "1b1a46eb8b80df91"),
    "eden3": ("a61566bf5d551ff1", "b476910567dee94e"),
    "eden4": ("9dcae9ac974e5815", "59a5935c36ebb9a2"),
    "int4": ("efadddb1022ebcbe", "775ec20510910e09"),
    "int8": ("2619ede250477761", "4a820025e79a6a2c"),
    "top10": ("4befc451e00184ed", "d69633588cadcb14"),
}
"""First bytes of the digests of a payload and of what is decoded from it."""

names = st.sampled_from(sorted(GOLDEN))
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
schemas = st.lists(shapes, max_size=4).map(
    lambda found: Schema(tuple(TensorSpec(f"t{i}", "m", Role.BIAS, shape) for i, shape in enumerate(found)))
)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_bytes_are_the_ones_written_down(name: str) -> None:
    payload = codec(name).encode(SCHEMA, VALUES)

    assert payload.hex() == GOLDEN[name]
    decoded = codec(name).decode(SCHEMA, payload)
    assert list(decoded) == ["m.lora_A", "m.bias"]
    for key, value in VALUES.items():
        np.testing.assert_array_equal(decoded[key], value)
        assert decoded[key].dtype == np.float32


@given(schemas, names, st.data())
def test_round_trip_is_exact_to_the_format(schema: Schema, name: str, data: st.DataObject) -> None:
    width = {"fp32": 32, "fp16": 16}[name]
    elements = st.floats(width=width, allow_nan=True, allow_infinity=True)  # type: ignore[arg-type]
    tensors = {s.name: data.draw(hnp.arrays(np.float32, s.shape, elements=elements)) for s in schema.tensors}

    payload = codec(name).encode(schema, tensors)

    assert len(payload) == codec(name).encoded_size(schema) == schema.size * width // 8
    for key, value in codec(name).decode(schema, payload).items():
        np.testing.assert_array_equal(value, tensors[key])


@given(schemas, names, st.binary(max_size=300))
def test_random_bytes_decode_to_the_schema_or_raise(schema: Schema, name: str, payload: bytes) -> None:
    if len(payload) == codec(name).encoded_size(schema):
        schema.check(codec(name).decode(schema, payload))
    else:
        with pytest.raises(CodecError, match=f"payload has {len(payload)} bytes; {name} under this schema needs"):
            codec(name).decode(schema, payload)


@given(schemas, names, st.data())
def test_any_bytes_of_the_right_length_decode(schema: Schema, name: str, data: st.DataObject) -> None:
    size = codec(name).encoded_size(schema)
    payload = data.draw(st.binary(min_size=size, max_size=size))

    decoded = codec(name).decode(schema, payload)

    schema.check(decoded)
    assert all(value.dtype == np.float32 for value in decoded.values())


@pytest.mark.parametrize("name", sorted(GOLDEN))
@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_payload_one_byte_off_is_refused(name: str, off_by: int) -> None:
    payload = bytes(codec(name).encoded_size(SCHEMA) + off_by)

    with pytest.raises(CodecError, match=f"payload has {len(payload)} bytes"):
        codec(name).decode(SCHEMA, payload)


def test_decoded_views_cannot_change_the_payload() -> None:
    payload = codec("fp32").encode(SCHEMA, VALUES)
    decoded = codec("fp32").decode(SCHEMA, payload)

    with pytest.raises(ValueError, match="read-only"):
        decoded["m.bias"] += 1


@pytest.mark.parametrize("value", [65520.0, -1e6, 3e38])
def test_fp16_refuses_what_it_cannot_hold(value: float) -> None:
    tensors = VALUES | {"m.bias": np.array([0.0, value], np.float32)}

    with pytest.raises(CodecError, match=r"'m\.bias' has a value beyond 65504 of fp16; use fp32"):
        codec("fp16").encode(SCHEMA, tensors)
    np.testing.assert_array_equal(
        codec("fp32").decode(SCHEMA, codec("fp32").encode(SCHEMA, tensors))["m.bias"], tensors["m.bias"]
    )


def test_fp16_rounds_to_nearest() -> None:
    fine = VALUES | {"m.bias": np.array([1 + 2.0**-12, 65519.0], np.float32)}

    decoded = codec("fp16").decode(SCHEMA, codec("fp16").encode(SCHEMA, fine))

    np.testing.assert_array_equal(decoded["m.bias"], [1.0, 65504.0])


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_tensors_of_another_schema_are_refused(name: str) -> None:
    with pytest.raises(SchemaError, match="missing"):
        codec(name).encode(SCHEMA, {"m.bias": VALUES["m.bias"]})
    with pytest.raises(SchemaError, match="has shape"):
        codec(name).encode(SCHEMA, VALUES | {"m.bias": np.zeros(3, np.float32)})


def test_ours_are_the_ones_written_down() -> None:
    assert {name for name, entry in entries("codecs").items() if entry.ours} == GOLDEN.keys() | PINNED.keys()
    assert all(codec(name) is codec(name) for name in GOLDEN)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_bytes_are_those_of_other_machines(name: str) -> None:
    draw = np.random.Generator(np.random.Philox(7))
    schema = Schema(
        (TensorSpec("m.B", "m", Role.LORA_B, (300, 8)), TensorSpec("head", "head", Role.HEAD, (3, 50))), scale=2.0
    )
    raw = {spec.name: draw.bit_generator.random_raw(spec.size).reshape(spec.shape) for spec in schema.tensors}
    # Sums of four uniform numbers, in whole ones: no function of a C library has a part in them.
    values = {
        key: (
            np.sum([each >> np.uint64(k) & np.uint64(0xFFFF) for k in (0, 16, 32, 48)], 0).astype(np.float32) - 131070
        )
        / 65536
        for key, each in raw.items()
    }

    payload = codec(name).encode(schema, values, seed_of("pinned"))

    decoded = b"".join(each.tobytes() for each in codec(name).decode(schema, payload).values())
    assert tuple(hashlib.sha256(each).hexdigest()[:16] for each in (payload, decoded)) == PINNED[name]


def test_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"unknown codec 'pickle'; this build has .*fp16, fp32"):
        codec("pickle")
