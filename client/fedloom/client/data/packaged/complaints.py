"""Made-up complaints to banks: which products they are about, and what went wrong."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.complaints_words import BANKS, FILLERS, ISSUES, PRODUCTS, Bank
from fedloom.client.data.packaged.made_up import distinct, filled, side
from fedloom.client.data.records import Record

__all__ = ["Complaints"]

_LETTERS = {"train": 3000, "test": 300}
"""Complaints to each bank."""


@dataclass(frozen=True)
class Complaints:
    """Complaints to four banks with tags of products and issues; drawn from a seed, and nobody's.

    The tags are like the products and issues of the complaint database of the United States' Consumer Financial
    Protection Bureau. A complaint has one to three issues, each about a product. No phrase of an issue that is held out
    occurs in one to train on, so that what counts is what a phrase means.
    """

    task: ClassVar[str] = "multi-label"

    def records(self, split: Split) -> Iterator[Record]:
        """The complaints of one split, bank by bank, no two of a bank alike."""
        for name, bank in BANKS.items():
            draw = random.Random(f"complaints {split} {name}")
            for number, record in enumerate(distinct(partial(_letter, name, bank, split, draw), _LETTERS[split]), 1):
                yield record._replace(where=f"complaints {split} {name} {number}")


def _letter(name: str, bank: Bank, split: Split, draw: random.Random) -> Record:
    """A sentence for each issue; the product is named in it, and may be the one before."""
    issues = draw.sample(sorted(ISSUES), draw.choice((1, 1, 2, 2, 3)))
    product = draw.choices(tuple(PRODUCTS), bank.mix)[0]
    tags = set[str]()
    sentences = [draw.choice(bank.openings)] if draw.random() < 0.5 else []
    for issue in issues:
        if draw.random() < 0.25:
            product = draw.choices(tuple(PRODUCTS), bank.mix)[0]
        tags |= {product, issue}
        fillers = {**FILLERS, "product": PRODUCTS[product]}
        sentences.append(filled(draw.choice(side(ISSUES[issue], split)), fillers, draw))
    if draw.random() < 0.5:
        sentences.append(draw.choice(bank.closings))
    text = " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)
    return Record("", text, group=name, tags=tuple(sorted(tags)))
