"""What somebody meant who wrote a name that there is not."""

import difflib
from collections.abc import Collection

__all__ = ["meant"]


def meant(word: str, known: Collection[str]) -> str | None:
    """A question after the nearest known name; None when none is near.

    >>> meant("fedsdv", ["fedavg", "fedsvd"])
    "did you mean 'fedsvd'?"
    """
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else None
