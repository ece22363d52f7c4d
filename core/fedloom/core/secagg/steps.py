"""The steps of a secure sum, and what a client sends and gets in each."""

import math
from enum import IntEnum

__all__ = ["ALL", "MASKED", "Step", "needed"]

MASKED = "secagg32"
"""Name of the payload of a masked update: one little-endian word modulo 2^32 for each value of the upload schema. Not
one of `CODECS`: nothing on either side can turn such a payload into tensors."""

ALL = ""
"""Key of a part that is for everybody."""


class Step(IntEnum):
    """The steps in their order; the numbers are on the wire."""

    ADVERTISE = 1
    """Sends {ALL: signed keys}; gets the keys of the cohort, by name."""
    SHARE = 2
    """Sends sealed shares, by the peer they are for; gets those for itself, by the peer they are from."""
    MASK = 3
    """Sends nothing here, since the masked update goes through Submit; gets the survivors as names of empty parts."""
    CONFIRM = 4
    """Sends {ALL: signature over the survivors}; gets the signatures, by name."""
    UNMASK = 5
    """Sends one share of each peer that has shared, by its name; gets nothing."""


def needed(clients: int, threshold: float) -> int:
    """t: shares that give a secret of a cohort's member, and clients that must last to the end.

    At least `threshold` of the clients, and always more than half: else two groups could be told different stories.

    >>> [needed(n, 2 / 3) for n in (3, 4, 6, 9, 16)], needed(4, 0.5)
    ([2, 3, 4, 6, 11], 3)
    """
    return max(math.ceil(threshold * clients), clients // 2 + 1)
