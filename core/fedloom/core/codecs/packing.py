"""Whole numbers of a few bits, end to end in bytes."""

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["pack", "packed_bytes", "unpack"]

Codes = npt.NDArray[np.uint8]


def packed_bytes(count: int, bits: int) -> int:
    """Length of `count` numbers of `bits` bits, 1 to 8.

    >>> packed_bytes(1024, 3), packed_bytes(3, 2)
    (384, 1)
    """
    return sum(-(-count * width // 8) for width in _widths(bits))


def pack(codes: Codes, bits: int) -> bytes:
    """Numbers below 2^bits as bytes, the first in the lowest bits.

    Three bits are two and one: the two lowest of all numbers, then the highest of all.

    >>> pack(np.array([1, 2, 3, 0, 1], np.uint8), 2).hex()
    '3901'
    """
    parts, rest = [], codes.reshape(-1)
    for width in _widths(bits):
        low = rest & np.uint8(0xFF >> 8 - width)
        rest = np.right_shift(rest, np.uint8(width % 8))
        per = 8 // width
        table = np.concatenate([low, np.zeros(-len(low) % per, np.uint8)]).reshape(-1, per)
        byte = table[:, 0].copy()
        for place in range(1, per):
            byte |= table[:, place] << np.uint8(place * width)
        parts.append(byte.tobytes())
    return b"".join(parts)


def unpack(payload: memoryview, count: int, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What each of `count` packed numbers stands for: `values` has 2^bits of them.

    >>> unpack(memoryview(bytes.fromhex("3901")), 5, np.array([0, 10, 20, 30], np.float32)).tolist()
    [10.0, 20.0, 30.0, 0.0, 10.0]
    """
    bits = len(values).bit_length() - 1
    widths, raw = _widths(bits), np.frombuffer(payload, np.uint8)
    if len(widths) == 1:
        return np.take(_per_byte(values.tobytes(), bits), raw, axis=0).reshape(-1)[:count]
    codes, offset, shift = np.zeros(count, np.uint8), 0, 0
    for width in widths:
        length = -(-count * width // 8)
        numbers = np.arange(1 << width, dtype=np.float32).tobytes()
        part = np.take(_per_byte(numbers, width).astype(np.uint8), raw[offset : offset + length], axis=0)
        codes |= part.reshape(-1)[:count] << np.uint8(shift)
        offset, shift = offset + length, shift + width
    return np.take(values, codes)


def _widths(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


@cache
def _per_byte(values: bytes, width: int) -> npt.NDArray[np.float32]:
    """The values of all numbers in each byte, shape (256, numbers in a byte)."""
    numbers = np.arange(256)[:, None] >> np.arange(0, 8, width) & (1 << width) - 1
    found: npt.NDArray[np.float32] = np.frombuffer(values, np.float32)[numbers]
    return found
