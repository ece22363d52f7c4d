"""raFLoRA (Wu et al., 2026, arXiv 2602.13486)."""

from dataclasses import dataclass

import numpy as np

from fedloom.core.schema import Array, Pair
from fedloom.strategies.api import Update
from fedloom.strategies.ranks.flexlora import FlexLoRA
from fedloom.strategies.stacking.stack import Kept, Stack, stack

__all__ = ["RaFLoRA"]


@dataclass(frozen=True)
class RaFLoRA(FlexLoRA):
    """FlexLoRA, in which each rank is averaged over the clients that have it.

    With p_k over all clients, what only those at a high rank learn shrinks in every round by the share of the others,
    and the adapter collapses to the smallest rank (the paper's theorem 1). Here the i-th column of B_k and row of A_k
    count w_k / sum_{j: r_j >= i} w_j (its equation for the partition that i is in), with w the clients' weights; then
    comes FlexLoRA's SVD. With equal ranks it is FlexLoRA.

    A rank that few clients have is the mean of few: in a private run it has their noise undivided.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1.
    """

    def aggregated(self, kept: Kept, pair: Pair) -> Stack:
        """The stack, each column weighed among those that have it."""
        having = np.zeros(max(update.delta[pair.a].shape[0] for update in kept.updates))
        for update in kept.updates:
            having[: update.delta[pair.a].shape[0]] += update.weight

        def columns(update: Update, share: float) -> Array:
            return update.weight / having[: update.delta[pair.a].shape[0]]

        return stack(kept, pair, columns)
