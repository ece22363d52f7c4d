"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import LORA, Pair, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.ranks.table import check_ranks, cut, rank_of
from fedloom.strategies.stacking.stack import Kept, Stack, keep, stack, unpaired
from fedloom.strategies.transforms.average import begin, trained

__all__ = ["FlexLoRA"]


@dataclass(frozen=True)
class FlexLoRA(Strategy):
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
    ranks: Mapping[str, int] = field(default_factory=dict)
    train_head: bool = True

    def __post_init__(self) -> None:
        """Refuse ranks that there are not."""
        check_ranks(self.ranks)

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        """The state before the first round.

        Raises:
            SchemaError: There are no pairs, or the adapter does not fit.
            ConfigError: A client's rank is above the adapter's.
        """
        self._trained(schema)
        check_ranks(self.ranks, schema)
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        """Both factors at the client's rank, and the head."""
        rank, words = self._rank(state, client), state.schema.words(self._trained(state.schema).names())
        if rank == state.schema.rank:
            return Plan(words, state.adapter)
        return Plan(words, cut(state.schema, state.adapter, rank), rank)

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return keep(self._trained(state.schema).with_rank(self._rank(state, update.client)), acc, update)

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

    def _rank(self, state: State, client: str) -> int:
        return rank_of(self.ranks, client, state.schema.rank)

    def _trained(self, schema: Schema) -> Schema:
        return trained(schema, LORA, head=self.train_head)
