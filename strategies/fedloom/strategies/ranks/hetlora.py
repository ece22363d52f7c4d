"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.schema import Schema, Tensors
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.ranks.ranked import Ranked, padded
from fedloom.strategies.transforms.average import Sum, add, check, mean

__all__ = ["HetLoRA"]


@dataclass(frozen=True)
class HetLoRA(Ranked):
    """Every client works at its own rank, cut from the adapter; updates are padded with zeros and averaged.

    The factors' values are averaged, so that a client without a row counts as zero there, with the weights
    w_k |(B_k A_k)| / sum_j w_j |(B_j A_j)|, the Frobenius norm over all pairs together (section 3.2 of the paper, its
    sparsity-weighted aggregation). The norm comes from r x r Gram matrices, and in a private run from noised factors.
    Averaging A and B is not averaging models, see FedAvg. The paper's other half, clients that penalise their last
    rows and prune them, is not here: a rank stays what the table says.

    Args:
        ranks: Rank of the clients whose name fits a pattern, such as {"phone-*" = 4}; others work at the adapter's.
        by_norm: Whether the norms count; without, clients count by their weights.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: A rank is below 1.
    """

    traits: ClassVar[Traits] = Traits(same_tensors=True, rewrites=True)
    by_norm: bool = True

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        """Add the update's values, padded, by its weight and norm.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        schema = self.trained(state.schema)
        check(self.uploaded(state.schema, update.client), update)
        values = {spec.name: padded(update.value(spec.name), spec.shape) for spec in schema.tensors}
        # The smallest weight there is stands for a product of zero, so that clients who all send one have a mean.
        weight = update.weight * max(_norm(schema, values), 1e-12) if self.by_norm else update.weight
        return add(acc, weight, values)

    def commit(self, state: State, acc: Sum | None) -> State:
        """The mean of the values.

        Raises:
            ProtocolError: No update was folded.
        """
        moved = {name: value.astype(np.float32) for name, value in mean(acc).items()}
        return replace(state, adapter={**state.adapter, **moved}, round=state.round + 1)


def _norm(schema: Schema, values: Tensors) -> float:
    """The Frobenius norm of all products together, by |B A|^2 = sum (B^T B) * (A A^T)."""
    squares = 0.0
    for pair in schema.pairs:
        a, b = values[pair.a], values[pair.b]
        squares += float(np.sum((b.T @ b) * (a @ a.T)))
    return math.sqrt(max(squares, 0.0))
