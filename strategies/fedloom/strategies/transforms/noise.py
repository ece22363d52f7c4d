"""Gaussian noise that a secret decides: unpredictable without the secret, the same bits again with it.

numpy's generators are not made to withstand an adversary, so the bits come from BLAKE2b and SHAKE256 (RFC 7693,
FIPS 202). Values are whole numbers, see `fedloom.core.privacy.gaussian`.
"""

import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fedloom.core.privacy.gaussian import Integers, rounded_normal

__all__ = ["KEY_BYTES", "derive", "normal"]

KEY_BYTES = 32


def derive(secret: bytes, parts: Iterable[bytes | memoryview]) -> bytes:
    """A key of 32 bytes that depends on every byte of `parts`, which must together decode in one way only.

    Args:
        secret: 32 bytes.
        parts: Bytes and contiguous buffers, hashed one after the other.
    """
    digest = hashlib.blake2b(key=secret, digest_size=KEY_BYTES, person=b"fedloom.noise")
    for part in parts:
        digest.update(part)
    return digest.digest()


def normal(key: bytes, stream: int, deviation: int, count: int) -> Integers:
    """`count` independent draws of a normal variable of this deviation, each rounded to the nearest whole number.

    Args:
        key: 32 bytes.
        stream: 0 to 2**32 - 1; different streams of one key are independent.
        deviation: Standard deviation, 1 to `LARGEST_DEVIATION`.
        count: Number of values.

    >>> draws = normal(bytes(32), 0, 1000, 100_000)
    >>> bool(abs(draws.mean()) < 20 and abs(draws.std() - 1000) < 10)
    True
    """
    blocks = itertools.count()

    def words(count: int) -> npt.NDArray[np.uint64]:
        block = key + stream.to_bytes(4, "little") + next(blocks).to_bytes(8, "little")
        return np.frombuffer(hashlib.shake_256(block).digest(8 * count), "<u8").astype(np.uint64)

    return rounded_normal(words, deviation, count)
