"""Shamir's secret sharing (CACM 22(11), 1979): t of n shares give the secret, fewer give nothing.

The secret is the constant term of a polynomial of degree t - 1 whose other coefficients are uniform in a prime field;
share x is its value at x. Python's integers take a time that depends on the numbers; a share is made and used on the
machine that owns it, within a round.
"""

import secrets
from collections.abc import Callable, Mapping

from fedloom.core.errors import ProtocolError

__all__ = ["PRIME", "SHARE_BYTES", "combine", "secret_bytes", "share_from_bytes", "share_to_bytes", "split"]

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that any 32 bytes are an element of the field."""

SHARE_BYTES = 33
"""Length of an encoded share."""

_SECRET_BYTES = 32


def split(
    secret: int, threshold: int, count: int, *, prime: int = PRIME, draw: Callable[[int], int] = secrets.randbelow
) -> list[int]:
    """Shares of `secret` for x = 1 to `count`, any `threshold` of which give it back.

    Args:
        secret: 0 to prime - 1.
        threshold: t, 1 to `count`.
        count: n, below `prime`.
        prime: Order of the field.
        draw: Uniform integers from 0 to below its argument; the operating system's unless a test says otherwise.

    Raises:
        ProtocolError: The numbers are out of range.

    >>> shares = split(7, 2, 3, prime=11)
    >>> combine({1: shares[0], 3: shares[2]}, prime=11)
    7
    """
    if not 1 <= threshold <= count < prime or not 0 <= secret < prime:
        raise ProtocolError(f"{threshold} of {count} shares of a secret in a field of {prime}: out of range")
    coefficients = [secret, *(draw(prime) for _ in range(threshold - 1))]
    return [_value(coefficients, x, prime) for x in range(1, count + 1)]


def combine(shares: Mapping[int, int], *, prime: int = PRIME) -> int:
    """The secret behind at least t shares, by their x; from fewer, or from wrong ones, some element of the field.

    Lagrange interpolation at zero.

    Raises:
        ProtocolError: There is no share, or an x or a share is not in the field.
    """
    if not shares or any(not 0 < x < prime or not 0 <= share < prime for x, share in shares.items()):
        raise ProtocolError(f"shares of {sorted(shares)} cannot be combined; each x and share must be in the field")
    secret = 0
    for x, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        secret = (secret + share * above * pow(below, -1, prime)) % prime
    return secret


def secret_bytes(secret: int) -> bytes:
    """A combined secret as the 32 bytes it was.

    Raises:
        ProtocolError: It is not one: a share was wrong.
    """
    if secret >= 1 << 8 * _SECRET_BYTES:
        raise ProtocolError("the shares do not belong together; at least one of them is wrong")
    return secret.to_bytes(_SECRET_BYTES, "big")


def share_to_bytes(share: int) -> bytes:
    """A share as `SHARE_BYTES` bytes."""
    return share.to_bytes(SHARE_BYTES, "big")


def share_from_bytes(data: bytes) -> int:
    """Read what `share_to_bytes` wrote.

    Raises:
        ProtocolError: It has another length or is not in the field.
    """
    share = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or share >= PRIME:
        raise ProtocolError(f"a share of {len(data)} bytes; {SHARE_BYTES} bytes below the field's order are needed")
    return share


def _value(coefficients: list[int], x: int, prime: int) -> int:
    """The polynomial at x, by Horner's rule; the constant term comes first."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value
