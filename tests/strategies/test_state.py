import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from fedloom.core.errors import StoreError
from fedloom.core.schema import Array, Role, Schema, TensorSpec
from fedloom.strategies.api import State
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_from_bytes, state_to_bytes

SCHEMA = Schema((TensorSpec("z.A", "z", Role.LORA_A, (2, 3)), TensorSpec("a.B", "z", Role.LORA_B, (4, 2))), scale=2.0)
MEMORY: dict[str, Array] = {
    "adapter/tricky": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "scalar": np.full((), 2.5),
    "empty": np.zeros((0, 3), np.float32),
}
STATE = State(SCHEMA, starting_adapter(SCHEMA, 1), seed=2**63 - 1, round=7, memory=MEMORY)


def _forged(scalars: object, tensors: dict[str, np.ndarray] | None = None) -> bytes:
    named = {f"adapter/{name}": tensor for name, tensor in STATE.adapter.items()} if tensors is None else tensors
    content: bytes = save(named, metadata={"fedloom.state": json.dumps(scalars)})
    return content


GOOD = {"version": 1, "seed": 0, "round": 0, "schema": SCHEMA.digest}


def test_everything_comes_back_in_its_own_type_and_order() -> None:
    back = state_from_bytes(state_to_bytes(STATE), SCHEMA)

    assert (back.seed, back.round, back.schema) == (STATE.seed, STATE.round, SCHEMA)
    assert list(back.adapter) == ["z.A", "a.B"]
    assert back.memory.keys() == MEMORY.keys()
    for group, kept in ((back.adapter, STATE.adapter), (back.memory, MEMORY)):
        for name, tensor in kept.items():
            np.testing.assert_array_equal(group[name], tensor)
            assert (group[name].dtype, group[name].shape) == (tensor.dtype, tensor.shape)


def test_equal_states_give_equal_bytes() -> None:
    reordered = replace(STATE, memory=dict(reversed(MEMORY.items())))

    assert state_to_bytes(STATE) == state_to_bytes(reordered)


def test_a_numpy_scalar_comes_back_as_an_array_without_dimensions() -> None:
    halved = MEMORY["scalar"] / 2
    assert isinstance(halved, np.float64)

    back = state_from_bytes(state_to_bytes(replace(STATE, memory={"scalar": halved})), SCHEMA)

    assert back.memory["scalar"].shape == ()
    assert back.memory["scalar"] == 1.25


def test_code_and_objects_are_not_stored() -> None:
    for stranger in (np.array([print], dtype=object), "text", np.array(["text"])):
        with pytest.raises(StoreError, match="memory/x is not a numeric array"):
            state_to_bytes(replace(STATE, memory={"x": stranger}))  # type: ignore[dict-item]  # the error under test


@pytest.mark.parametrize("cut", [0, 7, 8, 60, -1])
def test_cut_bytes_are_refused(cut: int) -> None:
    with pytest.raises(StoreError):
        state_from_bytes(state_to_bytes(STATE)[:cut], SCHEMA)


def test_every_damaged_header_byte_is_refused_or_harmless() -> None:
    content = state_to_bytes(STATE)
    length = int.from_bytes(content[:8], "little")
    for place in range(8 + length):
        damaged = bytearray(content)
        damaged[place] ^= 0x01
        try:
            back = state_from_bytes(bytes(damaged), SCHEMA)
        except StoreError:
            continue
        SCHEMA.check(back.adapter)


@pytest.mark.parametrize(
    ("scalars", "words"),
    [
        ({**GOOD, "version": 2}, "version 2"),
        ({**GOOD, "schema": "0" * 64}, "another adapter schema"),
        ({**GOOD, "round": "7"}, "wrong scalars"),
        ({**GOOD, "round": True}, "wrong scalars"),
        ({"version": 1}, "wrong scalars"),
        ([1], "no readable header"),
    ],
)
def test_wrong_scalars_are_refused(scalars: object, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        state_from_bytes(_forged(scalars), SCHEMA)


def test_negative_counts_are_refused() -> None:
    for key in ("round", "seed"):
        with pytest.raises(StoreError, match="negative"):
            state_from_bytes(_forged({**GOOD, key: -1}), SCHEMA)


def test_tensors_beside_the_state_are_refused() -> None:
    named = {f"adapter/{name}": tensor for name, tensor in STATE.adapter.items()}

    with pytest.raises(StoreError, match="'other'"):
        state_from_bytes(_forged(GOOD, {**named, "other": np.zeros(1)}), SCHEMA)
    with pytest.raises(StoreError, match="1 tensors missing"):
        state_from_bytes(_forged(GOOD, {"adapter/z.A": STATE.adapter["z.A"]}), SCHEMA)
    doubled = {name: tensor.astype(np.float64) for name, tensor in named.items()}
    with pytest.raises(StoreError, match="float64"):
        state_from_bytes(_forged(GOOD, doubled), SCHEMA)


def test_another_format_is_refused() -> None:
    with pytest.raises(StoreError, match="no readable header"):
        state_from_bytes(save(dict(STATE.adapter)), SCHEMA)
