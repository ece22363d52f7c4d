"""Functions of a gradient's singular values. It brings torch: import it where an optimiser is made."""

from collections.abc import Callable

import torch

__all__ = ["Spectrum", "on_singular_values"]

Spectrum = Callable[[torch.Tensor, int, int], torch.Tensor]
"""New singular values, from those of a matrix, the largest first, and its numbers of rows and columns."""


def on_singular_values(tensor: torch.Tensor, function: Spectrum) -> torch.Tensor:
    """U f(S) Vᵀ of the matrix U S Vᵀ that a tensor is.

    Rows and columns of zeros stay zeros and do not count: there the adapter is beyond the client's rank, and holds no
    noise either.

    Args:
        tensor: Any shape. One axis, or none, is one column; beyond the first, axes are put together.
        function: Applied in float32.

    Returns:
        Of the same shape and type. A tensor that is not finite comes back as it is, for the update to be refused.
    """
    matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    rows, columns = matrix.any(1), matrix.any(0)
    part = matrix[rows][:, columns].float()
    if part.numel() == 0 or not bool(part.isfinite().all()):
        return tensor
    u, values, v = torch.linalg.svd(part, full_matrices=False)
    changed = torch.zeros_like(matrix)
    changed[rows[:, None] & columns] = ((u * function(values, *part.shape)) @ v).flatten().to(matrix.dtype)
    return changed.view_as(tensor)
