"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import LORA, Pair, Schema, Tensors
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update, corrections
from fedloom.strategies.ranks.table import check_ranks, cut, rank_of
from fedloom.strategies.stacking.stack import Kept, Stack, corrected, keep, stack, unpaired
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.average import begin, trained

__all__ = ["FLoRA"]


@dataclass(frozen=True)
class FLoRA(Strategy):
    """Stack all clients' products, fold the stack into the frozen weights, and begin the next round with new pairs.

    B = [p_1 B_1, .., p_K B_K] and A = [A_1; ..; A_K] give B A = sum_k p_k B_k A_k exactly, whatever the clients' ranks
    (equation 5 of the paper); W0 <- W0 + s B A, and pairs are drawn anew with B = 0. The head is averaged.

    Clients receive the whole correction of W0 in every round, whose rank grows by the sum of the clients' ranks until
    it is full. In a private run each round's noise on A times that on B stays in W0, and pairs that begin at B = 0
    learn little in a few steps: in the FedSVD paper's setting it ends 10 to 25 points below FFA.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1.
    """

    traits: ClassVar[Traits] = Traits(keeps_updates=True, rewrites=True)
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
        """Both factors and the head, at the client's rank, and the correction so far."""
        rank = rank_of(self.ranks, client, state.schema.rank)
        start = state.adapter if rank == state.schema.rank else cut(state.schema, state.adapter, rank)
        words = state.schema.words(self._trained(state.schema).names())
        return Plan(words, {**start, **corrections(state)}, rank if rank < state.schema.rank else None)

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        rank = rank_of(self.ranks, update.client, state.schema.rank)
        return keep(self._trained(state.schema).with_rank(rank), acc, update)

    def commit(self, state: State, acc: Kept | None) -> State:
        """Fold the stacks, and draw new pairs.

        Raises:
            ProtocolError: No update was folded.
        """
        adapter, kept = unpaired(state, acc)
        stacks = {pair.module: self.merged(kept, pair) for pair in state.schema.pairs}
        fresh = starting_adapter(state.schema, _mixed(state.seed, state.round))
        adapter |= {name: fresh[name] for name in state.schema.names(*LORA)}
        return replace(state, adapter=adapter, memory=corrected(state, stacks), round=state.round + 1)

    def merged(self, kept: Kept, pair: Pair) -> Stack:
        """What is folded into the frozen weight of a pair's module."""
        return stack(kept, pair)

    def _trained(self, schema: Schema) -> Schema:
        return trained(schema, LORA, head=self.train_head)


def _mixed(seed: int, round: int) -> int:
    """A seed of this round's own."""
    return int(np.random.SeedSequence([seed, round]).generate_state(1)[0])
