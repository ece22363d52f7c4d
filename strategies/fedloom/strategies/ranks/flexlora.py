"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import Pair
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.ranks.ranked import Ranked
from fedloom.strategies.stacking.stack import Kept, Stack, keep, stack, unpaired

__all__ = ["FlexLoRA"]


@dataclass(frozen=True)
class FlexLoRA(Ranked):
    """Every client works at its own rank; what it gets are the first singular vectors of the mean product.

    D = sum_k p_k B_k A_k = U S V^T, from the stacked factors and an SVD of their small core; a client at rank r gets
    B = U_r S_r and A = V_r^T (algorithm 1 of the paper). The adapter is D at its own rank: what is lost is
    sqrt(sum_{i > r} sigma_i^2), the least there can be. W = W0 + s B A has one scale s at every rank here, the
    adapter's alpha over rank.

    In a private run D has the noise on A times that on B in it; the SVD cuts part of it off.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1.
    """

    traits: ClassVar[Traits] = Traits(same_tensors=True, keeps_updates=True, rewrites=True)

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return keep(self.uploaded(state.schema, update.client), acc, update)

    def commit(self, state: State, acc: Kept | None) -> State:
        """The mean product at the adapter's rank.

        Raises:
            ProtocolError: No update was folded.
        """
        adapter, kept = unpaired(state, acc)
        for pair in state.schema.pairs:
            rank = state.adapter[pair.a].shape[0]
            # Some directions beyond a stack of few columns: the old A's own, on which B is zero.
            b, a = self.aggregated(kept, pair)
            old = state.adapter[pair.a].astype(np.float64)
            b, a = refactorize(np.pad(b, ((0, 0), (0, rank))), np.concatenate([a, old]))
            adapter[pair.b], adapter[pair.a] = b[:, :rank].astype(np.float32), a[:rank].astype(np.float32)
        return replace(state, adapter=adapter, round=state.round + 1)

    def aggregated(self, kept: Kept, pair: Pair) -> Stack:
        """The factors of the product that clients share, of any rank."""
        return stack(kept, pair)
