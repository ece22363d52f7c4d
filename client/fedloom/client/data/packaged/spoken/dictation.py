"""Made-up recordings of orders on four wards: what is to be written of them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.spoken.orders import WARDS, Ward, order
from fedloom.client.data.packaged.spoken.rooms import RATE, heard_in
from fedloom.client.data.packaged.spoken.voices import Speaker, spoken, wave_file
from fedloom.client.data.records import Record

__all__ = ["Dictation"]

_RECORDINGS = {"train": 800, "test": 60}
"""Of each ward."""
_MOST_SECONDS = 5
"""What takes longer to say is left out."""
_SPARE = 1.4
"""Orders are said for each that is wanted: one in six takes longer."""


@dataclass(frozen=True)
class Dictation:
    """Orders dictated on four wards, each with voices, words and noise of its own; drawn from a seed, and nobody's.

    They are said in full and written as the house does: "give metoprolol 50 milligrams by mouth twice a day" is
    metoprolol 50 mg PO BID. They are drawn without regard to what a patient should have. No order that is held out, a
    drug with its dose for instance, is in what is to train on, and half of what is held out is said by a voice that
    says nothing else. eSpeak NG speaks, a program under GPL-3 that is called and no part of this package:
    `fedloom[speech]` installs it. A build of it gives equal samples wherever it runs.
    """

    task: ClassVar[str] = "speech-recognition"

    def records(self, split: Split) -> Iterator[Record]:
        """The recordings of one split, ward by ward, each of at most 5 seconds."""
        for place, (name, ward) in enumerate(WARDS.items()):
            draw, noise = random.Random(f"dictation {split} {name}"), np.random.default_rng([place, split == "test"])
            orders = [order(ward, split, draw) for _ in range(int(_SPARE * _RECORDINGS[split]))]
            speakers = [_speaker(ward, split, at, draw) for at in range(len(orders))]
            voices = spoken([(who, said) for who, (said, _) in zip(speakers, orders, strict=True)], draw)
            number = 0
            for (_, wanted), voice in zip(orders, voices, strict=True):
                heard = heard_in(voice, ward.noise, ward.level, noise)
                if len(heard) <= _MOST_SECONDS * RATE and number < _RECORDINGS[split]:
                    number += 1
                    where = f"dictation {split} {name} {number}"
                    yield Record(where, wanted, group=name, parts=(wanted,), audio=wave_file(heard))


def _speaker(ward: Ward, split: Split, at: int, draw: random.Random) -> Speaker:
    return ward.guest if split == "test" and at % 2 else draw.choice(ward.speakers)
