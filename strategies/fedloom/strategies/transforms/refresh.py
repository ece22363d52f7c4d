"""New directions for low-rank pairs: a subspace that is left behind goes into the frozen weights."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Traits, corrections
from fedloom.strategies.stacking.stack import Stack, corrected
from fedloom.strategies.transforms.refactorize import Refactorize
from fedloom.strategies.transforms.server_optimizer import FIRST_MOMENT
from fedloom.strategies.transforms.transform import Transform

__all__ = ["Refresh"]


@dataclass(frozen=True)
class Refresh(Transform):
    """After every rewriting, replace the last rows of each A by random ones orthogonal to all that were there.

    A refactorization orders directions by their singular values and never leaves the span of the first A. Here the
    product of the last ones, B_i A_i, goes into the frozen weight, W0 <- W0 + s B_i A_i, their columns of B begin at
    zero and their rows of A are drawn from the run's seed. The model stays, to float32 rounding, and only what clients
    have already noised is touched. Ours, not of a paper. The correction of the frozen weights is broadcast in every
    round, and its rank grows by `directions` at each rewriting.

    Args:
        inner: Rewrites pairs with orthonormal rows in A, sorted by their singular values.
        directions: Of each pair, at least 1 and below its rank.

    Raises:
        ConfigError: There are fewer than 1, or the inner strategy is none that rewrites.
    """

    inner: Refactorize
    directions: int

    def __post_init__(self) -> None:
        """Refuse what has no last directions."""
        if self.directions < 1:
            raise ConfigError(f"refresh is {self.directions}; set a number of directions from 1 up, or 0 for none")
        if not isinstance(self.inner, Refactorize):
            raise ConfigError(
                f"{type(self.inner).__name__} does not sort directions; put a refactorization inside the refresh"
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's."""
        return self.inner.traits

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state.

        Raises:
            SchemaError: A pair has no more directions than are replaced; or see the inner strategy.
        """
        for pair in schema.pairs:
            if (rank := adapter[pair.a].shape[0]) <= self.directions:
                raise SchemaError(
                    f"refresh = {self.directions} would replace all of {pair.module}, whose rank is {rank}; "
                    f"set it below {rank}"
                )
        return self.inner.init(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """The inner strategy's plan, and the correction so far."""
        plan = self.inner.plan(state, round, client)
        return replace(plan, broadcast={**plan.broadcast, **corrections(state)})

    def commit(self, state: State, acc: Any) -> State:
        """What the inner strategy commits, with new directions if it has just rewritten."""
        after = self.inner.commit(state, acc)
        if after.round % self.inner.period:
            return after
        draw = np.random.Generator(np.random.Philox(key=[after.seed, after.round]))
        adapter, memory = dict(after.adapter), dict(after.memory)
        dropped: dict[str, Stack] = {}
        for pair in after.schema.pairs:
            b, a = adapter[pair.b].astype(np.float64), adapter[pair.a].astype(np.float64)
            kept = len(a) - self.directions
            dropped[pair.module] = b[:, kept:], a[kept:]
            adapter[pair.a] = np.concatenate([a[:kept], _others(a, kept, draw)]).astype(np.float32)
            adapter[pair.b] = np.where(np.arange(len(a)) < kept, b, 0.0).astype(np.float32)
            if (moment := FIRST_MOMENT + pair.b) in memory:
                memory[moment] = np.where(np.arange(len(a)) < kept, memory[moment], 0.0)
        after = replace(after, adapter=adapter, memory=memory)
        return replace(after, memory=corrected(after, dropped))


def _others(a: Array, kept: int, draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """Random orthonormal rows in place of those from `kept` on, orthogonal to all of `a` where there is room."""
    rows, width = a.shape
    count = rows - kept
    avoid = a if rows + count <= width else a[:kept]
    # Householder's QR: columns beyond those of `avoid` are orthogonal to them, and to each other.
    basis, _ = np.linalg.qr(np.concatenate([avoid.T, draw.normal(size=(width, count))], axis=1))
    found = np.zeros((count, width))
    new = basis[:, len(avoid) : len(avoid) + count].T
    found[: len(new)] = new
    return found
