"""Which entries of a pretrained weight are trained: found from the weight alone, the same in every process.

A choice by gradients or by training would carry private rows into places that no noise covers; the weight is public.
"""

import hashlib

import torch

__all__ = ["digest", "principal", "residual", "smallest"]

_ITERATIONS = 3
"""How often `residual` fits its two parts. On the weights of MiniLM no place changes after that."""


def smallest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The entries of least size (SaRA).

    Args:
        weight: Shape (out, in), float32.
        count: How many, 1 to out times in.

    Returns:
        Their places, counted row by row, shape (count,), int64, ascending, on the weight's device. Of entries of equal
        size the earlier ones are taken.
    """
    return _first(weight.detach().to("cpu").abs(), count).to(weight.device)


def principal(weight: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """The entries that are largest in the weight's best approximation of rank r (LIFT).

    Args:
        weight: As for `smallest`.
        count: As for `smallest`.
        rank: r, at least 1.

    Returns:
        As for `smallest`.

    Raises:
        ValueError: The weight has no r singular values.
    """
    part = _low_rank_part(weight.detach().to("cpu", torch.float64), rank)
    return _first(-part.abs().float(), count).to(weight.device)


def residual(weight: torch.Tensor, count: int, rank: int) -> torch.Tensor:
    """The entries that a low-rank matrix fits worst: the support of S in W = L + S + noise (DSEE).

    L, of rank r, and S, of `count` entries, are each the best fit to what the other leaves, by turns (GoDec, Zhou and
    Tao, ICML 2011, in place of the paper's GreBsmo, which fits approximately); S starts at zero.

    Args:
        weight: As for `smallest`.
        count: As for `smallest`.
        rank: As for `principal`.

    Returns:
        As for `smallest`.

    Raises:
        ValueError: The weight has no r singular values.
    """
    whole = weight.detach().to("cpu", torch.float64)
    sparse, places = torch.zeros_like(whole), torch.zeros(0, dtype=torch.int64)
    for _ in range(_ITERATIONS):
        rest = whole - _low_rank_part(whole - sparse, rank)
        places = _first(-rest.abs().float(), count)
        flat = whole.new_zeros(whole.numel())
        flat[places] = rest.flatten()[places]
        sparse = flat.view(whole.shape)
    return places.to(weight.device)


def digest(places: torch.Tensor) -> str:
    """Eight hex digits of the SHA-256 of the places.

    A sparse tensor's name ends in it: two processes with other masks have other schemas, and a join is refused.
    """
    return hashlib.sha256(places.to("cpu").numpy().astype("<i8").tobytes()).hexdigest()[:8]


def _low_rank_part(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of rank r, shape and type as the weight's, float64."""
    if rank > min(weight.shape):
        raise ValueError(
            f"adapter.rank = {rank} is above its {min(weight.shape)} singular values; lower it, or name other layers"
        )
    if weight.shape[0] > weight.shape[1]:
        return _low_rank_part(weight.t(), rank).t()
    # Its left singular vectors, which are the eigenvectors of the small Gram matrix, in less time than all of the SVD.
    leading: torch.Tensor = torch.linalg.eigh(weight @ weight.t()).eigenvectors[:, -rank:]
    return leading @ (leading.t() @ weight)


def _first(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the smallest keys, ascending. Keys are float32: what float64 rounds differently elsewhere is equal."""
    return torch.argsort(keys.flatten(), stable=True)[:count].sort().values
