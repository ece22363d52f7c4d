"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Role, Schema, Tensors
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.transforms.average import Sum, apply_mean_delta, begin, fold, trained

__all__ = ["FedSVD"]


@dataclass(frozen=True)
class FedSVD:
    """Train B (and the head), average exactly, then rewrite every pair by its SVD: B = U S, A = V^T (algorithm 1).

    The rewriting leaves the model as it is, up to float32 rounding of the stored factors, and touches only what
    clients have already noised, so it costs no privacy. It happens on the coordinator and A is broadcast, because
    singular vectors recomputed on clients need not agree.

    The rows of A rotate within the span of the first A and never leave it. Under SGD with L2 clipping and isotropic
    noise, also with momentum that starts anew each round, the trained model therefore has the same law as under FFA
    with `orthonormal`, but for the first rounds, whose A is the starting A as it was drawn. Adam, per-coordinate
    compression and momentum kept across rounds see the basis and make it a different method.

    Args:
        period: Rewrite after every so many rounds, at least 1; the paper uses 1.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: `period` is below 1.
    """

    linear: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    period: int = 1
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse a period that never comes."""
        if self.period < 1:
            raise ConfigError(f"FedSVD period is {self.period}; set a number of rounds from 1 up")

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: The schema has no lora_B, or the adapter does not fit.
        """
        self._trained(schema)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """B and the head, the same for all clients and rounds."""
        return Plan(train=self._trained(state.schema).roles, broadcast=state.adapter)

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add one weighted update, see `mean.fold`."""
        return fold(self._trained(state.schema), acc, update)

    def commit(self, state: State, acc: Sum | None) -> State:
        """Move B and the head by the mean change, then rewrite the pairs if their round has come."""
        adapter = apply_mean_delta(state.adapter, acc)
        done = state.round + 1
        if done % self.period == 0:
            adapter = _rewritten(state.schema, adapter)
        return replace(state, adapter=adapter, round=done)

    def _trained(self, schema: Schema) -> Schema:
        return trained(schema, {Role.LORA_B}, head=self.train_head)


def _rewritten(schema: Schema, adapter: dict[str, Array]) -> dict[str, Array]:
    rewritten = dict(adapter)
    for pair in schema.pairs:
        b, a = refactorize(adapter[pair.b], adapter[pair.a])
        rewritten[pair.b], rewritten[pair.a] = b.astype(np.float32), a.astype(np.float32)
    return rewritten
