"""What is true of a strategy's result. Everything that is scored, sent, downloaded or exported comes from there.

It is the adapter and, of a strategy that corrects the frozen weights, the correction: W = W0 + s (B A + base_B base_A).
"""

from dataclasses import replace

import numpy as np

from fedloom.core.errors import SchemaError
from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import State, corrections

__all__ = ["base_rank", "result_schema", "voided"]


def voided(state: State, before: State) -> State:
    """A state that remembers what `state` does and whose model is that of `before`."""
    ours = corrections(state)
    memory = {name: each for name, each in state.memory.items() if name not in ours}
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
    names = (f"{pair.module}.base_A" for pair in schema.pairs)
    return max((tensors[name].shape[0] for name in names if name in tensors), default=0)
