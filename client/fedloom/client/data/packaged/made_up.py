"""What generators of made-up texts share."""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.records import Record

__all__ = ["distinct", "filled", "side"]

_Made = TypeVar("_Made")
_GAP = re.compile(r"\{(\w+)\}")


def side(pool: Sequence[_Made], split: Split) -> tuple[_Made, ...]:
    """The part of a pool that one split draws from: every fourth is held out.

    >>> side("abcdef", "train"), side("abcdef", "test")
    (('a', 'b', 'c', 'e', 'f'), ('d',))
    """
    return tuple(each for at, each in enumerate(pool) if (at % 4 == 3) == (split == "test"))


def filled(phrase: str, fillers: Mapping[str, Sequence[str]], draw: random.Random) -> str:
    """The phrase with one of `fillers` in the place of each name in braces.

    >>> filled("{few} days", {"few": ["3"]}, random.Random(0))
    '3 days'
    """
    return _GAP.sub(lambda gap: draw.choice(fillers[gap[1]]), phrase)


def distinct(make: Callable[[], Record], count: int) -> Iterator[Record]:
    """So many rows, no two alike to a privacy account, for which capitals and punctuation are nothing."""
    seen = set[str]()
    while len(seen) < count:
        record = make()
        known = " ".join(re.findall(r"\w+", record.text.lower()))
        if known not in seen:
            seen.add(known)
            yield record
