"""ChaCha20's key stream in integer tensor operations, on any device: RFC 8439, all blocks of a call at once.

A block is sixteen words of 32 bits, which are added, XORed and rotated. Here they are int32: two's complement adds, and
multiplies by a power of two, the same bits whether they are read with a sign or without, and what overflows is gone,
as modulo 2^32. A shift to the right would bring the sign in, and a mask takes it out again. The key, the nonce and the
constants are arguments of kernels, so nothing is copied from the host and nothing waits.
"""

import numpy as np
import torch

__all__ = ["blocks", "words"]

_CONSTANT = b"expand 32-byte k"
_WORDS = 8
"""Words of 64 bits in one block."""


def words(key: bytes, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Words `first` to `first + count - 1` of a key's stream under the nonce 0, int64, shape (count,).

    Args:
        key: 32 bytes, from the operating system and used for nothing else.
        first: At least 0; a word is eight bytes of the stream, the first byte the lowest.
        count: How many, at least 1.
        device: Where they are computed.
    """
    start, end = first // _WORDS, -(-(first + count) // _WORDS)
    stream = blocks(key, start, end - start, device).flatten().view(torch.int64)
    return stream[first - start * _WORDS :][:count]


def blocks(key: bytes, first: int, count: int, device: torch.device, nonce: bytes = bytes(8)) -> torch.Tensor:
    """Blocks `first` to `first + count - 1`, int32, shape (count, 16): 64 bytes each, in the order of the stream.

    The counter has 64 bits and the nonce as many. RFC 8439 has 32 and 96 in the same places: the high half of the
    counter is the first third of its nonce.
    """
    state = torch.empty(16, count, dtype=torch.int32, device=device)
    for row, word in zip((*range(12), 14, 15), np.frombuffer(_CONSTANT + key + nonce, "<i4").tolist(), strict=True):
        state[row].fill_(word)
    state[12:14] = torch.arange(first, first + count, device=device).view(torch.int32).view(count, 2).t()
    a, b, c, d = state.clone().view(4, 4, count).unbind()
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        # The diagonals as columns, and back.
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat((a, b, c, d)).add_(state).t().contiguous()


def _quarter_rounds(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four quarter rounds side by side; the rows of each argument, (4, count), are one word of each of the four."""
    a = a.add_(b)
    d = _rotated(d.bitwise_xor_(a), 16)
    c = c.add_(d)
    b = _rotated(b.bitwise_xor_(c), 12)
    a = a.add_(b)
    d = _rotated(d.bitwise_xor_(a), 8)
    c = c.add_(d)
    b = _rotated(b.bitwise_xor_(c), 7)
    return a, b, c, d


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    """To the left."""
    return (word >> (32 - bits)).bitwise_and_((1 << bits) - 1).add_(word, alpha=1 << bits)
