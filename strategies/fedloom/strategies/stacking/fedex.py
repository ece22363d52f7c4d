"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Pair
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.stacking.both_factors import BothFactors
from fedloom.strategies.stacking.stack import Float64, Kept, Stack, corrected, keep, shares, stack, unpaired

__all__ = ["FedEx", "averaged"]


@dataclass(frozen=True)
class FedEx(BothFactors):
    """Average A and B one by one, and put what that misses into the frozen weights.

    W0 <- W0 + s (sum_k p_k B_k A_k - B A) with B and A the means (equation 10 of the paper): the model is the mean of
    the clients' models. The residual is sum_k p_k (B_k - B)(A_k - A), of rank up to (K - 1) r for K clients; clients
    receive the sum of all rounds' residuals, at most at full rank.

    In a private run the residual holds the noise on A times that on B, and W0 keeps it: FFA and FedSVD do not have it.

    Args:
        residual_rank: Rank to which each round's residual is cut by its SVD, the best there is (Eckart and Young); 0
            cuts nothing.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: The rank is negative.
    """

    traits: ClassVar[Traits] = Traits(same_tensors=True, keeps_updates=True)
    residual_rank: int = 0

    def __post_init__(self) -> None:
        """Refuse a rank that is none."""
        if self.residual_rank < 0:
            raise ConfigError(
                f"strategy.options.residual_rank is {self.residual_rank}; set a rank, or 0 to cut nothing off"
            )

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return keep(self.trained(state.schema), acc, update)

    def commit(self, state: State, acc: Kept | None) -> State:
        """The means, and the correction with this round's residual.

        Raises:
            ProtocolError: No update was folded.
        """
        adapter, kept = unpaired(state, acc)
        residuals: dict[str, Stack] = {}
        for pair in state.schema.pairs:
            b, a = averaged(kept, pair)
            adapter[pair.b], adapter[pair.a] = b, a
            stacked_b, stacked_a = stack(kept, pair)
            # Minus the means as they are stored: the correction takes their rounding in as well.
            residuals[pair.module] = self._cut(
                np.concatenate([stacked_b, -b.astype(np.float64)], 1), np.concatenate([stacked_a, a.astype(np.float64)])
            )
        return replace(state, adapter=adapter, memory=corrected(state, residuals), round=state.round + 1)

    def _cut(self, b: Float64, a: Float64) -> Stack:
        if not self.residual_rank:
            return b, a
        b, a = refactorize(b, a)
        return b[:, : self.residual_rank], a[: self.residual_rank]


def averaged(kept: Kept, pair: Pair) -> tuple[Array, Array]:
    """The means of B and of A, float32."""
    b, a = (
        sum(share * update.value(name) for share, update in zip(shares(kept), kept.updates, strict=True))
        for name in (pair.b, pair.a)
    )
    return np.asarray(b, np.float32), np.asarray(a, np.float32)
