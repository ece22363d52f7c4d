"""The leading singular vectors of a pretrained weight, the same in every process that has the weight."""

import torch

__all__ = ["leading_singular"]

_LEAST_GAP = 1e-8
"""Least relative distance of two neighbouring singular values. Rounding in float64 turns their vectors towards each
other by some 1e-15 over it: by what is nothing in float32."""


def leading_singular(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rank-r part U diag(s) Vᵀ of a weight, computed in float64 on the CPU.

    The largest entry of each left vector is positive: a singular vector is given but for its sign, which libraries
    choose differently.

    Args:
        weight: Shape (out, in), float32.
        rank: r, at least 1.

    Returns:
        U (out, r), s (r,) in descending order and Vᵀ (r, in), float32, on the weight's device.

    Raises:
        ValueError: The weight has fewer singular values, or some are equal, which leaves their vectors open.
    """
    if rank > min(weight.shape):
        raise ValueError(
            f"adapter.rank = {rank} is above its {min(weight.shape)} singular values; lower it, or name other layers"
        )
    left, values, right = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    ends = torch.cat([values[: rank + 1], torch.zeros(rank + 1 - len(values[: rank + 1]), dtype=values.dtype)])
    if not bool((-ends.diff() > _LEAST_GAP * values[0]).all()):
        raise ValueError(
            f"two of its {rank + 1} largest singular values are equal, so its singular vectors are not determined; "
            "lower adapter.rank, or name other layers"
        )
    left, right = left[:, :rank], right[:rank]
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    found = left * signs, values[:rank], right * signs.t()
    return found[0].to(weight), found[1].to(weight), found[2].to(weight)
