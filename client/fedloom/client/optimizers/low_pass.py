"""A low-pass filter for gradients. It brings torch: import it where an optimiser is made."""

import torch

__all__ = ["low_pass", "smoothed"]

_TAPS = ((-2, 1 / 16), (-1, 4 / 16), (0, 6 / 16), (1, 4 / 16), (2, 1 / 16))
"""Weights of the neighbours at these distances: the binomial ones of four, about a Gaussian of standard deviation 1."""


def low_pass(tensor: torch.Tensor) -> torch.Tensor:
    """Each value's weighted mean with its four nearest neighbours along the longest axis, as [1, 4, 6, 4, 1] / 16.

    Along it lie the inputs of a lora_A and the outputs of a lora_B; the other one is the rank, whose order means
    nothing. Its ends are neighbours of each other: the matrix of the filter is then symmetric with eigenvalues
    cos^4(pi k / n), from 0 to 1, so that no tensor gets longer and the mean of its values stays.

    Args:
        tensor: At least one axis.

    Returns:
        Of the same shape and type.

    >>> low_pass(torch.tensor([16.0, 0, 0, 0, 0, 0])).tolist()
    [6.0, 4.0, 1.0, 0.0, 1.0, 4.0]
    """
    axis = max(range(tensor.ndim), key=lambda each: tensor.shape[each])
    result = torch.zeros_like(tensor)
    for distance, weight in _TAPS:
        result.add_(tensor.roll(distance, axis), alpha=weight)
    return result


def smoothed(made: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser, whose steps see every gradient filtered."""

    def smooth(*_: object) -> None:
        for group in made.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    each.grad = low_pass(each.grad)

    made.register_step_pre_hook(smooth)
    return made
