"""What the model of a state is. Everything that is scored, sent, downloaded or exported comes from here.

It is the adapter and, of a strategy that corrects the frozen weights, the correction: W = W0 + s (B A + base_B base_A).
"""

from dataclasses import replace

import numpy as np

from fedloom.core.errors import SchemaError
from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import State, Strategy

__all__ = ["base_rank", "corrections", "result", "result_schema", "voided"]


def result(strategy: Strategy, state: State) -> Tensors:
    """The model of a state, as tensors of `result_schema`.

    A strategy that declares a method `result` says it itself. Otherwise it is `corrections` beside the adapter.
    """
    own = getattr(strategy, "result", None)
    found: Tensors = own(state) if callable(own) else {**state.adapter, **corrections(state)}
    return found


def corrections(state: State) -> Tensors:
    """What the memory holds under the names that corrections have in a broadcast: MODULE.base_A and MODULE.base_B."""
    return {name: state.memory[name] for name in _names(state.schema) if name in state.memory}


def voided(state: State, before: State) -> State:
    """A state that remembers what `state` does and whose model is that of `before`."""
    memory = {name: each for name, each in state.memory.items() if name not in _names(state.schema)}
    return replace(state, adapter=before.adapter, memory={**memory, **corrections(before)})


def result_schema(schema: Schema, tensors: Tensors) -> Schema:
    """The schema of a result: that of the adapter, and of a correction of every pair if there is one.

    Raises:
        SchemaError: The tensors are not exactly those, in finite float32.
    """
    rank = base_rank(schema, tensors)
    whole = schema.with_base(rank) if rank else schema
    whole.check(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise SchemaError(f"tensor {name!r} of a result is {tensor.dtype}; finite float32 values are needed")
    return whole


def base_rank(schema: Schema, tensors: Tensors) -> int:
    """Rank of the correction factors among the tensors; 0 when there are none."""
    ranks = {tensors[name].shape[0] for name in _names(schema) if name.endswith(".base_A") and name in tensors}
    return max(ranks, default=0)


def _names(schema: Schema) -> tuple[str, ...]:
    return tuple(f"{pair.module}.base_{side}" for pair in schema.pairs for side in "AB")
