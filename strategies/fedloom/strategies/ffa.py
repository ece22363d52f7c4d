"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import Array, Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.lowrank import orthonormal_rows
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, trained

__all__ = ["FFA"]


@dataclass(frozen=True)
class FFA:
    """Freeze A as it was drawn and train B (and the head): the average is exact and noise enters linearly.

    With A shared, sum_k p_k B_k A = (sum_k p_k B_k) A. Clients upload half of a pair. They receive both factors
    in every round, although A never changes, so that one that joins late needs nothing else.

    Args:
        orthonormal: Replace the starting A by an orthonormal basis of its row space, and B so that their product
            stays. Under plain SGD with L2 clipping and isotropic noise FedSVD then follows the same law; with PEFT's
            draw the gradients on B are about sqrt(3) larger than without, so learning rates do not carry over.
        train_head: Whether the head is trained; it is broadcast either way.
    """

    linear: ClassVar[bool] = True
    orthonormal: bool = False
    train_head: bool = True

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: The schema has no lora_B, or the adapter does not fit.
        """
        self._trained(schema)
        state = begin(schema, adapter, seed)
        if not self.orthonormal:
            return state
        rotated: dict[str, Array] = {}
        for pair in schema.pairs:
            a, b = adapter[pair.a], adapter[pair.b]
            basis = orthonormal_rows(a)
            rotated[pair.a] = basis.astype(np.float32)
            if b.any():  # an earlier adapter's; a fresh one is zero
                rotated[pair.b] = (b.astype(np.float64) @ (a.astype(np.float64) @ basis.T)).astype(np.float32)
        return replace(state, adapter={**adapter, **rotated})

    def plan(self, state: State, round: int, client: str) -> Plan:
        """B and the head, the same for all clients and rounds."""
        return Plan(train=self._trained(state.schema).roles, broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update, see `mean.fold`."""
        return fold(self._trained(state.schema), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move B and the head by the mean change."""
        return replace(state, adapter=apply_mean_delta(state.adapter, acc), round=state.round + 1)

    def _trained(self, schema: Schema) -> Schema:
        return trained(schema, {Role.LORA_B}, head=self.train_head)
