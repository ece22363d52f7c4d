"""Low-rank pairs rewritten on the coordinator: the same products, in other coordinates."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from fedloom.core.errors import ConfigError, SchemaError
from fedloom.core.schema import LORA, Array, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits
from fedloom.strategies.lowrank import RANK_TOLERANCE, orthonormal_rows, refactorize
from fedloom.strategies.transforms.server_optimizer import FIRST_MOMENT
from fedloom.strategies.transforms.transform import Transform

__all__ = ["Basis", "OrthonormalStart", "Refactorize", "SingularValues"]

Basis = Literal["turned", "kept"]
"""What becomes of A after its first rewriting: it turns with every further one, or it stays."""

SingularValues = Literal["B", "both"]
"""Where the singular values go: into B (algorithm 1 of FedSVD), or their roots into both factors."""


@dataclass(frozen=True)
class Refactorize(Transform):
    """After every `period` rounds, write each pair by its SVD: B = U S, A = V^T (Lee et al., arXiv 2505.12805).

    The model stays as it is, up to float32 rounding of the stored factors, and only what clients have already noised
    is touched, so it costs no privacy. It happens on the coordinator and A is broadcast, because singular vectors
    that clients recompute need not agree.

    Momentum on the coordinator turns along: with A' the new basis, m_B <- m_B A A'^T is the same direction of the
    product, m_B A, since the rows of A lie in the span of those of A'.

    Args:
        inner: Any strategy whose memory holds nothing in the coordinates of a pair but momentum.
        period: Rounds from one rewriting to the next, at least 1.
        singular_values: "B" leaves the rows of A orthonormal; "both" gives B = U S^(1/2), A = S^(1/2) V^T.
        basis: "kept" rewrites once and leaves A as it is then. Its rows span what they would span, B takes the turn,
            and no client needs A again. Where local steps do not see the basis, the model has the same law.

    Raises:
        ConfigError: `period` is below 1, A is to be kept and not orthonormal, or the inner strategy keeps moments that
            cannot be turned, or remembers clients.
    """

    inner: Strategy
    period: int = 1
    singular_values: SingularValues = "B"
    basis: Basis = "turned"

    def __post_init__(self) -> None:
        """Refuse a period that never comes, and moments that would be left in the old coordinates."""
        who, traits = type(self.inner).__name__, self.inner.traits
        if self.period < 1:
            raise ConfigError(f"refactorization period is {self.period}; set a number of rounds from 1 up")
        if self.singular_values not in get_args(SingularValues):
            raise ConfigError(f"singular values go to {self.singular_values!r}; choose B or both")
        if self.basis not in get_args(Basis):
            raise ConfigError(f"the basis is {self.basis!r}; choose turned or kept")
        if self.basis == "kept" and self.singular_values != "B":
            raise ConfigError(
                'a basis that is kept has orthonormal rows; set singular_values = "B" or basis = "turned"'
            )
        if traits.remembers_clients:
            raise ConfigError(
                f"{who} remembers a gradient of every client in the coordinates of A and B, which a refactorization "
                "turns; leave one of the two out"
            )
        if traits.moments and not traits.linear_moments:
            raise ConfigError(
                f"{who} keeps second moments in the coordinates of A and B, and a refactorization turns these: the "
                "squares of other directions cannot be had from them. Use momentum, or leave out the server optimizer "
                "or the refactorization"
            )
        if traits.moments and self.singular_values == "both":
            raise ConfigError(
                f"{who} keeps momentum, which turns along only where the rows of A are orthonormal; "
                'set singular_values = "B" or leave out the momentum'
            )

    @property
    def traits(self) -> Traits:
        """The inner strategy's, and that coordinates change."""
        return replace(self.inner.traits, rewrites=True)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The inner strategy's state.

        Raises:
            SchemaError: There are no pairs, or see the inner strategy.
        """
        _check_pairs(schema)
        return self.inner.init(schema, adapter, seed)

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
        due = after.round % self.period == 0 and (self.basis == "turned" or after.round == self.period)
        return self._rewritten(after) if due else after

    def _rewritten(self, state: State) -> State:
        adapter, memory = dict(state.adapter), dict(state.memory)
        for pair in state.schema.pairs:
            old = adapter[pair.a].astype(np.float64)
            b, a = refactorize(adapter[pair.b], old)
            if self.singular_values == "both":
                roots = _roots(b)
                b, a = b / roots, a * roots[:, None]
            adapter[pair.b], adapter[pair.a] = b.astype(np.float32), a.astype(np.float32)
            if (moment := FIRST_MOMENT + pair.b) in memory:
                memory[moment] = memory[moment] @ (old @ a.T)
        return replace(state, adapter=adapter, memory=memory)


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
            SchemaError: There are no pairs, or see the inner strategy.
        """
        _check_pairs(schema)
        state = self.inner.init(schema, adapter, seed)
        rotated: dict[str, Array] = {}
        for pair in schema.pairs:
            a, b = state.adapter[pair.a], state.adapter[pair.b]
            basis = orthonormal_rows(a)
            rotated[pair.a] = basis.astype(np.float32)
            if b.any():  # an earlier adapter's; a fresh one is zero
                rotated[pair.b] = (b.astype(np.float64) @ (a.astype(np.float64) @ basis.T)).astype(np.float32)
        return replace(state, adapter={**state.adapter, **rotated})


def _check_pairs(schema: Schema) -> None:
    """Refuse an adapter in which nothing would be rewritten, such as one whose factors travel as changes."""
    if not schema.pairs:
        raise SchemaError(
            "this strategy rewrites pairs of lora_A and lora_B, but the adapter has "
            f"{', '.join(sorted(schema.roles))}; change adapter.kind or strategy"
        )


def _roots(b: Array) -> Array:
    """Square roots of the column norms of B, which are the singular values; 1 for those that are zero.

    A row of A that its zero singular value would shrink to nothing could never be trained again.
    """
    lengths = np.linalg.norm(b, axis=0)
    return np.sqrt(np.where(lengths > RANK_TOLERANCE * lengths.max(), lengths, 1.0))
