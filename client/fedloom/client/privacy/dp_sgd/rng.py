"""Where randomness comes from: the operating system in a private run, a seed otherwise.

A seed the coordinator knows would let it subtract the noise, so nothing in a run file or a message can
choose it for a private run. `Seeded` is for training without privacy and for tests.
"""

import math
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedloom.core.privacy.gaussian import Integers, rounded_normal

__all__ = ["Entropy", "Seeded", "System", "drawn_groups", "poisson"]

Floats = npt.NDArray[np.float64]


class Entropy(Protocol):
    """A stream of independent draws."""

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1), each a multiple of 2^-53."""

    def normal(self, deviation: int, count: int) -> Integers:
        """`count` draws of a normal variable of this standard deviation, each rounded to the nearest whole number."""


class System:
    """The operating system's generator; cannot be seeded, and never repeats after fork or restore.

    >>> draws = System().normal(1000, 5)
    >>> draws.shape, draws.dtype.name
    ((5,), 'int64')
    """

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1) with 53 random bits each."""
        return (_system_words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, deviation: int, count: int) -> Integers:
        """`count` exact draws, see `fedloom.core.privacy.gaussian`."""
        return rounded_normal(_system_words, deviation, count)


def _system_words(count: int) -> npt.NDArray[np.uint64]:
    """Uniform words of 64 bits: AES-256-CTR under a key that the operating system has just drawn, used this once.

    The system's own generator gives the same strength at a fifth of the speed.
    """
    stream = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), np.uint64)


class Seeded:
    """A reproducible stream, keyed by integers such as (seed, round, client).

    >>> bool((Seeded(1, 2).normal(9, 5) == Seeded(1, 2).normal(9, 5)).all())
    True
    """

    def __init__(self, *key: int) -> None:
        """Equal keys give equal streams."""
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def uniform(self, count: int) -> Floats:
        """`count` values in [0, 1)."""
        return self._generator.random(count)

    def normal(self, deviation: int, count: int) -> Integers:
        """`count` exact draws."""
        return rounded_normal(lambda words: self._generator.integers(0, 1 << 64, words, np.uint64), deviation, count)


def poisson(entropy: Entropy, count: int, rate: float) -> npt.NDArray[np.int64]:
    """One Poisson sample of `count` examples: each is in it on its own, with probability `rate` in (0, 1].

    The probability is `rate` rounded down to a multiple of 2^-53, so never above what is accounted.

    Returns:
        Indices in rising order, shape (k,); k is random, may be 0, and must not be made public.

    >>> poisson(Seeded(1), 4, 1.0).tolist()
    [0, 1, 2, 3]
    """
    return np.flatnonzero(entropy.uniform(count) < math.floor(rate * 2**53) * 2.0**-53).astype(np.int64)


def drawn_groups(entropy: Entropy, count: int, groups: int) -> npt.NDArray[np.int64]:
    """A group from 0 to `groups` - 1 for each of `count` examples, each drawn on its own: shape (count,).

    That nobody's group depends on who else is there is all that noise bands ask of it. Of one group nothing is drawn.

    >>> drawn_groups(Seeded(1), 5, 1).tolist(), sorted(set(drawn_groups(Seeded(1), 99, 3).tolist()))
    ([0, 0, 0, 0, 0], [0, 1, 2])
    """
    if groups == 1:
        return np.zeros(count, np.int64)
    return (entropy.uniform(count) * groups).astype(np.int64)
