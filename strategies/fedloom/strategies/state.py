"""A strategy's state as bytes: safetensors with one JSON line of scalars, checked when it is read back."""

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedloom.core.errors import SchemaError, StoreError
from fedloom.core.schema import Array, Schema
from fedloom.strategies.api import State

__all__ = ["state_from_bytes", "state_to_bytes"]

_VERSION = 1
_KEY = "fedloom.state"
_ADAPTER, _MEMORY = "adapter/", "memory/"
_DTYPES = frozenset(
    {"bool", "float16", "float32", "float64"} | {f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)}
)


def state_to_bytes(state: State) -> bytes:
    """The state in a form that holds no code: the same bytes for the same state.

    Tensors are named adapter/NAME and memory/NAME; version, seed, round and schema digest are one JSON text
    under the metadata key "fedloom.state". The schema itself is not inside: the run stores it once.

    Raises:
        StoreError: `adapter` or `memory` holds something other than a numeric array.
    """
    tensors: dict[str, Array] = {}
    for prefix, group in ((_ADAPTER, state.adapter), (_MEMORY, state.memory)):
        for name, tensor in group.items():
            # Arithmetic on arrays without dimensions gives numpy scalars; they come back as such arrays.
            if not isinstance(tensor, np.ndarray | np.generic) or tensor.dtype.name not in _DTYPES:
                raise StoreError(f"state entry {prefix}{name} is not a numeric array; keep only numpy arrays there")
            tensors[prefix + name] = np.asarray(tensor, order="C")
    scalars = {"version": _VERSION, "seed": state.seed, "round": state.round, "schema": state.schema.digest}
    # One metadata key only: safetensors writes several in no fixed order, and equal states must give equal bytes.
    content: bytes = save(tensors, metadata={_KEY: json.dumps(scalars, separators=(",", ":"))})
    return content


def state_from_bytes(content: bytes, schema: Schema) -> State:
    """Read what `state_to_bytes` wrote for an adapter of `schema`.

    Raises:
        StoreError: The bytes are damaged, of another version, or of a run with another schema.
    """
    scalars = _scalars(content)
    if scalars["version"] != _VERSION:
        raise StoreError(f"state of version {scalars['version']}; this build reads version {_VERSION}; upgrade fedloom")
    if scalars["schema"] != schema.digest:
        raise StoreError("the state belongs to another adapter schema; resume the run with its own run file")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise StoreError(f"state is not a safetensors document: {error}; restore it from a copy") from error
    strangers = [name for name in tensors if not name.startswith((_ADAPTER, _MEMORY))]
    if strangers:
        raise StoreError(f"state holds {strangers[0]!r}; only adapter/ and memory/ are allowed; restore it from a copy")
    adapter = {name.removeprefix(_ADAPTER): each for name, each in tensors.items() if name.startswith(_ADAPTER)}
    memory = {name.removeprefix(_MEMORY): each for name, each in tensors.items() if name.startswith(_MEMORY)}
    try:
        schema.check(adapter)
    except SchemaError as error:
        raise StoreError(f"state does not fit its schema: {error}; restore it from a copy") from error
    wrong = [f"{name!r} is {each.dtype}" for name, each in adapter.items() if each.dtype != np.float32]
    if wrong:
        raise StoreError(f"adapter tensor {wrong[0]}; float32 is stored; restore the state from a copy")
    in_order = {spec.name: adapter[spec.name] for spec in schema.tensors}
    return State(schema, in_order, scalars["seed"], scalars["round"], memory)


def _scalars(content: bytes) -> dict[str, Any]:
    """The JSON line in the header: 8 bytes of little-endian length, then a JSON object."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise StoreError(f"state of {len(content)} bytes is cut off; restore it from a copy")
    try:
        scalars = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
        kinds = {"version": int, "seed": int, "round": int, "schema": str}
        if {key: type(value) for key, value in scalars.items()} != kinds:
            raise StoreError("state has wrong scalars in its header; restore it from a copy")
        if scalars["seed"] < 0 or scalars["round"] < 0:
            raise StoreError("state has a negative seed or round in its header; restore it from a copy")
        return {str(key): value for key, value in scalars.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"state has no readable header: {error}; restore it from a copy") from error
