"""RoLoRA's turns with an orthonormal factor at rest; ours, not of a paper."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedloom.core.schema import Array, Schema, Tensors
from fedloom.strategies.alternating.rolora import RoLoRA
from fedloom.strategies.api import State, Strategy, Traits
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.transforms.refactorize import OrthonormalStart
from fedloom.strategies.transforms.transform import Composed, Transform

__all__ = ["AlternatingOrthonormal"]


@dataclass(frozen=True)
class AlternatingOrthonormal(Composed):
    """Train B over an A with orthonormal rows in one round, and A over a B with orthonormal columns in the next.

    RoLoRA (arXiv 2502.01755) with FedSVD's rewriting (arXiv 2505.12805) before every round, on the side that rests:
    B = U S, A = V^T before B is trained, and B = U, A = S V^T before A is. The product stays. Averages are exact and
    clients upload half of a pair as under RoLoRA; the gradient on one factor is that on the product seen through an
    orthonormal basis, so clipping and noise mean the same in every round. Unlike FedSVD's, the rewriting is not only a
    change of basis: the factor that comes to rest was trained in the round before.

    Args:
        train_head: Whether the head is trained, in every round; it is broadcast either way.
    """

    train_head: bool = True

    def build(self) -> Strategy:
        """RoLoRA, with every pair rewritten for the round that comes."""
        return OrthonormalStart(_Turned(RoLoRA(self.train_head)))


@dataclass(frozen=True)
class _Turned(Transform):
    """After every commit, the factor that rests in the next round is orthonormal. Even rounds train B."""

    inner: Strategy

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, rewrites=True)

    def commit(self, state: State, acc: Any) -> State:
        after = self.inner.commit(state, acc)
        return replace(after, adapter=_turned(after.schema, after.adapter, b_is_next=after.round % 2 == 0))


def _turned(schema: Schema, adapter: Tensors, b_is_next: bool) -> dict[str, Array]:
    turned = dict(adapter)
    for pair in schema.pairs:
        if b_is_next:
            b, a = refactorize(adapter[pair.b], adapter[pair.a])
        else:
            # The mirror image: (B A)^T = A^T B^T has orthonormal rows in B^T and the singular values in A^T.
            a, b = (each.T for each in refactorize(adapter[pair.a].T, adapter[pair.b].T))
        turned[pair.b], turned[pair.a] = np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32)
    return turned
