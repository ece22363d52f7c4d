"""LoRA-FAIR (Bian et al., ICCV 2025, arXiv 2411.14961)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedloom.core.errors import ConfigError
from fedloom.strategies.api import State, Traits, Update
from fedloom.strategies.stacking.both_factors import BothFactors
from fedloom.strategies.stacking.fedex import averaged
from fedloom.strategies.stacking.stack import Kept, keep, stack, unpaired

__all__ = ["LoRAFAIR"]


@dataclass(frozen=True)
class LoRAFAIR(BothFactors):
    """Average A and B, then move B so that B A comes as near to the mean of the products as a penalty lets it.

    With D = sum_k p_k B_k A_k the paper maximises a cosine similarity by gradient steps (equation 9). Here it is the
    Frobenius distance, which has a closed form: min_E |D - (B + E) A|^2 + penalty |E|^2 is at
    E = (D - B A) A^T (A A^T + penalty I)^-1. The r x r system is all that is solved, and D is never formed.

    The average is nearer to exact than FedAvg's at the same bytes, and not exact: what lies outside the row space of
    the mean A is lost. In a private run E is made of noised factors and costs nothing.

    Args:
        penalty: What |E|^2 counts, positive; the larger it is, the more the result is FedAvg's. A row of PEFT's A is
            about 0.6 long, so that A A^T is near 0.33 I.
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: The penalty is not positive.
    """

    traits: ClassVar[Traits] = Traits(same_tensors=True, keeps_updates=True)
    penalty: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a penalty with which there may be no minimum."""
        if not 0 < self.penalty < np.inf:
            raise ConfigError(f"strategy.options.penalty is {self.penalty!r}; set a positive number")

    def fold(self, state: State, acc: Kept | None, update: Update) -> Kept:
        """Keep the update.

        Raises:
            SchemaError: A tensor is missing, unexpected or of another shape.
            UpdateRejected: The change or the weight is not usable.
        """
        return keep(self.trained(state.schema), acc, update)

    def commit(self, state: State, acc: Kept | None) -> State:
        """The means, with B moved.

        Raises:
            ProtocolError: No update was folded.
        """
        adapter, kept = unpaired(state, acc)
        for pair in state.schema.pairs:
            b, a = (each.astype(np.float64) for each in averaged(kept, pair))
            stacked_b, stacked_a = stack(kept, pair)
            missed = stacked_b @ (stacked_a @ a.T) - b @ (a @ a.T)  # (D - B A) A^T, shape (out, r)
            move = np.linalg.solve(a @ a.T + self.penalty * np.eye(len(a)), missed.T).T
            adapter[pair.b], adapter[pair.a] = (b + move).astype(np.float32), a.astype(np.float32)
        return replace(state, adapter=adapter, round=state.round + 1)
