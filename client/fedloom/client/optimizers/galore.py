"""GaLore: Adam in the leading singular directions of the gradient (Zhao et al., ICML 2024, arXiv 2403.03507)."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedloom.client.optimizers.adam import LONGEST_STEP
from fedloom.client.optimizers.adamw import moments
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch  # a coordinator has none

__all__ = ["GaLore"]


class GaLore(Section):
    """Adam in the leading singular directions of an earlier gradient of the round.

    For g of m by n, m <= n: w <- w - a r P Adam(Pᵀ g), where P is the first `projection_rank` left singular vectors of
    the gradient of the round's first step, and of every `period` steps after. That gradient is noised like all, so
    choosing P is post-processing. Moments stay when P changes. A matrix that is taller than wide is projected on its
    right singular vectors. A matrix of no more rows or columns than the projection has, and a tensor that is no matrix,
    take Adam's steps times a.

    With `two_sided`, right singular vectors Q as well: w <- w - a r P Adam(Pᵀ g Q) Qᵀ, as GradNormLoRP does on weights
    of columns with a magnitude and a direction (Huang et al., AAAI 2025, arXiv 2412.19616): `lora` with `dora`.

    Moments take less memory than Adam's, and noise is kept out of all other directions. Where it hides the gradient of
    one step, the directions are those of the noise, until the next P.
    """

    projection_rank: int = Field(default=4, ge=1, le=4096)
    """Number of directions that a matrix moves in."""
    period: int = Field(default=200, ge=1, le=100_000)
    """Steps between two choices of the directions; each round begins with one."""
    two_sided: bool = False
    """Keep to the leading right singular vectors too."""
    scale: float = Field(default=0.25, ge=1e-4, le=1e4)
    """Factor a of the step."""

    def make(self, groups: list[dict[str, Any]], noise_std: float) -> "torch.optim.Optimizer":
        """It does not correct for the noise."""
        import torch

        from fedloom.client.optimizers.per_tensor import PerTensor

        def projections(gradient: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor | None"]:
            """P, and Q if there is one.

            Orthonormal columns, but for zeros where the gradient has no direction left, or no value in a row.
            """
            if not bool(gradient.isfinite().all()):
                nothing = torch.full_like(gradient[:, : self.projection_rank], math.nan)
                return nothing, None  # the update will be refused
            u, values, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            beyond_rounding = values > 2.0**-23 * max(gradient.shape) * values[0]
            kept = [u * beyond_rounding * gradient.any(1)[:, None]]
            if self.two_sided:
                kept.append(right.T * beyond_rounding * gradient.any(0)[:, None])
            first, *second = [each[:, : self.projection_rank].to(gradient.dtype) for each in kept]
            return first, second[0] if second else None

        def step(value: "torch.Tensor", gradient: "torch.Tensor", state: dict[str, Any], rate: float) -> None:
            if gradient.ndim != 2 or min(gradient.shape) <= self.projection_rank:
                mean, root, bias = moments(state, gradient)
                value.addcdiv_(mean, root, value=-self.scale * rate / bias)
                return
            wide, target = (gradient, value) if gradient.shape[0] <= gradient.shape[1] else (gradient.T, value.T)
            if state.setdefault("until", 0) == 0:
                state |= {"until": self.period, "projections": projections(wide)}
            state["until"] -= 1
            left, right = state["projections"]
            seen = left.T @ wide
            if right is not None:
                seen = seen @ right
                # Of the gradient that chose P and Q this is diagonal: Adam would make whole steps of rounding beside.
                seen *= seen.abs() > 2.0**-23 * max(wide.shape) * seen.abs().max()
            mean, root, bias = moments(state, seen)
            moved = mean / root
            target.addmm_(left, moved if right is None else moved @ right.T, alpha=-self.scale * rate / bias)

        return PerTensor(groups, step)

    def longest_move(self, steps: int, rate: float, gradient: float, values: int, pull: float) -> float:
        """7.3 a T r sqrt(d): P and Q keep lengths, and fewer values move than Adam's."""
        return self.scale * steps * LONGEST_STEP * rate * math.sqrt(values)
