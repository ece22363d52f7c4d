"""Low-rank pairs rewritten on the coordinator: the same products, in other coordinates."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits
from fedloom.strategies.lowrank import orthonormal_rows, refactorize
from fedloom.strategies.transforms.transform import Transform

__all__ = ["OrthonormalStart", "Refactorize"]


@dataclass(frozen=True)
class Refactorize(Transform):
    """After every `period` rounds, write each pair by its SVD: B = U S, A = V^T (Lee et al., arXiv 2505.12805).

    The model stays as it is, up to float32 rounding of the stored factors, and only what clients have already noised
    is touched, so it costs no privacy. It happens on the coordinator and A is broadcast, because singular vectors
    that clients recompute need not agree.

    Args:
        inner: Any strategy whose memory holds nothing in the coordinates of a pair.
        period: Rounds from one rewriting to the next, at least 1.

    Raises:
        ConfigError: `period` is below 1, or the inner strategy keeps moments.
    """

    inner: Strategy
    period: int = 1

    def __post_init__(self) -> None:
        """Refuse a period that never comes, and moments that would be left in the old coordinates."""
        if self.period < 1:
            raise ConfigError(f"refactorization period is {self.period}; set a number of rounds from 1 up")
        if self.inner.traits.moments:
            raise ConfigError(
                f"{type(self.inner).__name__} keeps moments in the coordinates of A and B, and a refactorization turns "
                "these: the moments would belong to other directions. Leave out the server optimizer or the "
                "refactorization"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, and that coordinates change."""
        return replace(self.inner.traits, rewrites=True)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan.

        Raises:
            ConfigError: Clients keep a factor to themselves, which would stay in the old coordinates.
        """
        plan = self.inner.plan(state, round, client)
        kept = state.schema.select(plan.personal).names() & state.schema.names(*LORA)
        if kept:
            raise ConfigError(
                f"{type(self.inner).__name__} lets clients keep {', '.join(sorted(kept)[:3])}, and a refactorization "
                "rewrites both factors of a pair together; leave one of the two out"
            )
        return plan

    def commit(self, state: State, acc: Any) -> State:
        """What the inner strategy commits, with its pairs rewritten if their round has come."""
        after = self.inner.commit(state, acc)
        return replace(after, adapter=_rewritten(after)) if after.round % self.period == 0 else after


@dataclass(frozen=True)
class OrthonormalStart(Transform):
    """Begin from an orthonormal basis of A's row space, and from the B that leaves the product as it is.

    Args:
        inner: Any strategy.
    """

    inner: Strategy

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state, its pairs rotated.

        Raises:
            SchemaError: See the inner strategy.
        """
        state = self.inner.init(schema, adapter, seed)
        rotated: dict[str, Array] = {}
        for pair in schema.pairs:
            a, b = state.adapter[pair.a], state.adapter[pair.b]
            basis = orthonormal_rows(a)
            rotated[pair.a] = basis.astype(np.float32)
            if b.any():  # an earlier adapter's; a fresh one is zero
                rotated[pair.b] = (b.astype(np.float64) @ (a.astype(np.float64) @ basis.T)).astype(np.float32)
        return replace(state, adapter={**state.adapter, **rotated})


def _rewritten(state: State) -> dict[str, Array]:
    adapter = dict(state.adapter)
    for pair in state.schema.pairs:
        b, a = refactorize(adapter[pair.b], adapter[pair.a])
        adapter[pair.b], adapter[pair.a] = b.astype(np.float32), a.astype(np.float32)
    return adapter
