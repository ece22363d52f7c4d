"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import LORA, Pair
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.ranks.ranked import Ranked
from fedloom.strategies.stacking.stack import Kept, Stack, corrected, keep, stack, unpaired
from fedloom.strategies.start import starting_adapter

__all__ = ["FLoRA"]


@dataclass(frozen=True)
class FLoRA(Ranked):
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

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return keep(self.uploaded(state.schema, update.client), acc, update)

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


def _mixed(seed: int, round: int) -> int:
    """A seed of this round's own."""
    return int(np.random.SeedSequence([seed, round]).generate_state(1)[0])
