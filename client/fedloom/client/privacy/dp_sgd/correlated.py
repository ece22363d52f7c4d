"""Noise bands on a client: sums multiplied by C before the noise, releases by its inverse after it."""

from collections import deque

import torch

from fedloom.core.privacy.banded import FRACTION_BITS, Banded

__all__ = ["Correlated"]


class Correlated:
    """C and its inverse, one step of a round after the other.

    Keeps the last b sums, which are exact and must not leave the machine, and the last b - 1 releases: 12 bytes for
    each trained value and band.
    """

    def __init__(self, strategy: Banded) -> None:
        """Begin a round."""
        self._strategy = strategy
        self._step = 0
        self._sums: deque[torch.Tensor] = deque(maxlen=strategy.bands)
        self._released: deque[torch.Tensor] = deque(maxlen=strategy.bands - 1)

    def mix(self, total: torch.Tensor) -> None:
        """Put round((C Z)_t) in place of this step's sum Z_t, whole numbers of shape (P,), int64.

        The products are exact: 2^24 examples of at most 2^20 in one value, times a row of C, fit into 64 bits.
        """
        self._sums.appendleft(total.clone())
        total.fill_(1 << (FRACTION_BITS - 1))
        for weight, each in zip(self._strategy.row(self._step), self._sums, strict=True):
            total.add_(each, alpha=weight)
        total >>= FRACTION_BITS  # rounds down, so that with the half it rounds to nearest

    def unmix(self, noised: torch.Tensor) -> torch.Tensor:
        """(C^-1 Y)_t for this step's noised Y_t, by what was released before; shape (P,), float32. Ends the step.

        It computes on nothing but releases, so its rounding costs no privacy.
        """
        first, *others = (weight * 2.0**-FRACTION_BITS for weight in self._strategy.row(self._step))
        for weight, before in zip(others, self._released, strict=True):
            noised.sub_(before, alpha=weight)
        noised.div_(first)
        self._released.appendleft(noised.clone())
        self._step += 1
        return noised
