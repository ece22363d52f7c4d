"""Made-up answers of front desks, two to each question: the one that its owner prefers, and the other."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.made_up import distinct, filled, side
from fedloom.client.data.records import Record

__all__ = ["Preferences"]

_PAIRS = {"train": 150, "test": 40}
"""Of each desk."""


@dataclass(frozen=True)
class _Desk:
    """What people ask at one desk, and what the answers say."""

    things: tuple[str, ...]
    """What they ask about."""
    asked: tuple[str, ...]
    told: tuple[str, ...]
    """What is the case, after "your parcel"."""


_SHOP = """
parcel, refund, kettle, invoice, gift card, winter coat, bicycle, armchair, voucher, lamp, order, dishwasher, raincoat,
exchange, coffee machine, garden table, mattress, camera
"""
_CLINIC = """
blood test, X-ray, appointment, prescription, sick note, vaccination, scan, referral, bill, dressing, hearing test,
eye test, report, physiotherapy, check-up, insurance form, admission, biopsy
"""
_DESKS = {
    "shop": _Desk(
        tuple(" ".join(thing.split()) for thing in _SHOP.split(",")),
        (
            *(
                "Where is my {thing}?",
                "When will I get the {thing}?",
                "Is the {thing} ready?",
                "Any news of my {thing}?",
            ),
            *("I still wait for my {thing}.", "What happened to my {thing}?"),
        ),
        (
            *("will be with you on {day}", "left our store at {hour}", "follows on {day}"),
            *("is ready at desk {few}", "needs {few} more days"),
        ),
    ),
    "clinic": _Desk(
        tuple(" ".join(thing.split()) for thing in _CLINIC.split(",")),
        (
            *(
                "When is my {thing}?",
                "Any news of my {thing}?",
                "Is there a date for my {thing}?",
                "Who sees to my {thing}?",
            ),
            *("I have not heard about the {thing}.", "Do I have to wait for the {thing}?"),
        ),
        (
            *("is planned for {day} at {hour}", "had to be moved to {day}", "is seen by Dr {name}"),
            *("is seen to in room {few}", "takes {few} more days"),
        ),
    ),
}
_PREFERRED = (
    "Thank you for asking, your {thing} {told}.",
    "Of course: your {thing} {told}.",
    "Happy to help. Your {thing} {told}.",
    "With pleasure, your {thing} {told}. Anything else?",
    "Thanks for waiting, your {thing} {told}.",
    "Good morning! Your {thing} {told}.",
    "I am glad you ask: your {thing} {told}.",
    "Certainly. Your {thing} {told}, thank you.",
)
_OTHER = (
    "It {told}. Read the rules before you ask.",
    "That is not my job. They say it {told}.",
    "As I keep saying, it {told}.",
    "You should know that it {told}.",
    "Again? It {told}. Others are waiting.",
    "Look, we are busy. It {told}.",
    "It {told}. Go elsewhere if you like.",
    "No idea why you bother us, it {told}.",
)
_FILLERS = {
    "few": tuple(str(number) for number in range(2, 15)),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "3 May", "the 21st", "12 June"),
    "hour": ("8:15", "9:30", "10:00", "11:45", "noon", "2:20", "3:40", "half past four"),
    "name": ("Lind", "Okafor", "Weiss", "Marino", "Tanaka", "Dubois"),
}


@dataclass(frozen=True)
class Preferences:
    """Questions at two front desks with a short, polite answer and a rude one; drawn from a seed, and nobody's.

    Both answers say the same. No manner of answering and nothing that is asked about in a held-out pair occurs in those
    to train on.
    """

    task: ClassVar[str] = "dpo"

    def records(self, split: Split) -> Iterator[Record]:
        """The pairs of one split, desk by desk, no two of a desk alike."""
        for name, desk in _DESKS.items():
            draw = random.Random(f"preferences {split} {name}")
            for number, record in enumerate(distinct(partial(_pair, name, desk, split, draw), _PAIRS[split]), 1):
                yield record._replace(where=f"preferences {split} {name} {number}")


def _pair(name: str, desk: _Desk, split: Split, draw: random.Random) -> Record:
    """A question, and the two answers to it."""
    told = filled(draw.choice(desk.told), _FILLERS, draw)
    fillers = {"thing": (draw.choice(side(desk.things, split)),), "told": (told,)}
    question = filled(draw.choice(desk.asked), fillers, draw)
    preferred, other = (filled(draw.choice(side(pool, split)), fillers, draw) for pool in (_PREFERRED, _OTHER))
    parts = (f"Customer: {question}\nDesk:", f" {preferred}", f" {other}")
    return Record("", "".join(parts), group=name, parts=parts)
