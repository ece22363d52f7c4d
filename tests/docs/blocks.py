"""The code blocks of a page, with the marks after their language that say what a test does with each."""

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["DOCS", "Block", "blocks"]

DOCS = Path(__file__).parents[2] / "docs"

_FENCE = re.compile(r"^```(\w+)[ ]?([^\n]*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One block.

    Marks: none runs sh and python and only shows the rest; `background` starts a command that goes on until the page
    ends; `file=PATH` writes the block there; `said` is what the last command printed; `not-run: WHY` leaves it out.
    """

    line: int
    language: str
    mark: str
    text: str


def blocks(page: str) -> list[Block]:
    """Every block of docs/PAGE, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start()) + 1, found[1], found[2].strip(), found[3])
        for found in _FENCE.finditer(text)
    ]
