"""Where randomness comes from: the operating system in a private run, a seed otherwise.

A seed the coordinator knows would let it subtract the noise, so nothing in a run file or a message can
choose it for a private run. `Seeded` is for training without privacy and for tests.
"""

import os
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Entropy", "Seeded", "System", "poisson"]

Floats = npt.NDArray[np.float64]


class Entropy(Protocol):
    """A stream of independent draws."""

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1)."""

    def normal(self, count: int) -> Floats:
        """`count` standard normal values."""


class System:
    """The operating system's generator; cannot be seeded, and never repeats after fork or restore.

    >>> draws = System().normal(1000)
    >>> draws.shape, bool(np.isfinite(draws).all())
    ((1000,), True)
    """

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1) with 53 random bits each."""
        bits = np.frombuffer(os.urandom(8 * count), np.uint64)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> Floats:
        """`count` standard normal values by the Box-Muller transform in float64."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))  # 1 - u lies in (0, 1], so the logarithm is finite
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


class Seeded:
    """A reproducible stream, keyed by integers such as (seed, round, client).

    >>> bool((Seeded(1, 2).normal(5) == Seeded(1, 2).normal(5)).all())
    True
    """

    def __init__(self, *key: int) -> None:
        """Equal keys give equal streams."""
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1)."""
        return self._generator.random(count)

    def normal(self, count: int) -> Floats:
        """`count` standard normal values."""
        return self._generator.standard_normal(count)


def poisson(entropy: Entropy, count: int, rate: float) -> npt.NDArray[np.int64]:
    """One Poisson sample of `count` examples: each is in it on its own, with probability `rate` in (0, 1].

    Returns:
        Indices in rising order, shape (k,); k is random, may be 0, and must not be made public.

    >>> poisson(Seeded(1), 4, 1.0).tolist()
    [0, 1, 2, 3]
    """
    return np.flatnonzero(entropy.uniform(count) < rate).astype(np.int64)
