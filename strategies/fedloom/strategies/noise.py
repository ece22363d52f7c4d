"""Gaussian noise that a secret decides: unpredictable without the secret, the same bits again with it.

numpy's generators are not made to withstand an adversary, so the bits come from BLAKE2b and SHAKE256 (RFC 7693,
FIPS 202). Values are float64 and continuous; attacks on the low bits of floating-point noise (Mironov, CCS 2012)
are not ruled out.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

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


def normal(key: bytes, stream: int, count: int) -> npt.NDArray[np.float64]:
    """`count` independent standard normal values, by the Box-Muller transform.

    Args:
        key: 32 bytes.
        stream: 0 to 2**32 - 1; different streams of one key are independent.
        count: Number of values.

    >>> draws = normal(bytes(32), 0, 100_000)
    >>> bool(abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.01)
    True
    """
    half = (count + 1) // 2
    content = hashlib.shake_256(key + stream.to_bytes(4, "little")).digest(16 * half)
    uniform = (np.frombuffer(content, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:half]))  # 1 - u lies in (0, 1], so the logarithm is finite
    angle = 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
