"""Made-up recordings of words that steer a machine: which one is said."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.made_up import side
from fedloom.client.data.packaged.spoken.rooms import RATE, heard_in
from fedloom.client.data.packaged.spoken.voices import Speaker, spoken, wave_file
from fedloom.client.data.records import Record

__all__ = ["Keywords"]

_RECORDINGS = {"train": 500, "test": 100}
"""Of each hall."""
_MOST_SECONDS = 1
_KEYWORDS = ("start", "stop", "lift", "lower", "left", "right", "faster", "slower")
_OTHER = "other"
_SHARE_OF_OTHER = 0.2
_OTHERS = """
again alright always around before better between bottle bucket carry chair coffee corner counter doctor early enough
evening finger forty garden hammer hello holder kitchen ladder lately later letter light loud maybe mister Monday
morning never number o'clock open orange over paper people pocket police quiet ready seven shift silver slowly start-up
station stopwatch story storm table thank thirty tower twenty under walk water weather window yellow yesterday
"""
"""What people say beside a machine; some of it sounds like a keyword."""


@dataclass(frozen=True)
class _Hall:
    """Who works in a hall, and how it sounds there."""

    speakers: tuple[Speaker, ...]
    guest: Speaker
    """Says half of what is held out, and nothing else."""
    noise: str
    """As in `rooms`."""
    level: float
    """How loud that is, as a share of the voice."""


_HALLS: Mapping[str, _Hall] = {
    "assembly": _Hall(
        (Speaker("en-us+m3", 160, 45), Speaker("en-gb-x-rp+f2", 165, 55), Speaker("en-us+m8", 155, 40)),
        Speaker("en-us+f2", 160, 50),
        "hum",
        0.35,
    ),
    "packing": _Hall(
        (Speaker("en-gb-scotland+m2", 165, 45), Speaker("en-us+f4", 170, 55), Speaker("en-029+m4", 165, 50)),
        Speaker("en-gb-scotland+f3", 165, 50),
        "crowd",
        0.45,
    ),
    "paintshop": _Hall(
        (Speaker("en-gb-x-gbclan+m3", 160, 40), Speaker("en-us-nyc+f2", 160, 55), Speaker("en-us+m5", 155, 45)),
        Speaker("en-gb-x-gbclan+f4", 160, 50),
        "hall",
        0.3,
    ),
    "foundry": _Hall(
        (Speaker("en-gb-x-gbcwmd+m1", 170, 45), Speaker("en-029+f3", 165, 55), Speaker("en-gb-x-rp+m7", 165, 40)),
        Speaker("en-029+f1", 165, 50),
        "monitor",
        0.35,
    ),
}


@dataclass(frozen=True)
class Keywords:
    """Words that steer a machine, said in four halls with voices and noise of their own; drawn from a seed.

    One in five is another word, label `other`; those of the held-out rows are in none to train on, and half of these
    rows are said by a voice that says nothing else. eSpeak NG speaks, see `Dictation`.
    """

    task: ClassVar[str] = "audio-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """The recordings of one split, hall by hall, each of about a second."""
        others = side(_OTHERS.split(), split)
        for place, (name, hall) in enumerate(_HALLS.items()):
            draw, noise = random.Random(f"keywords {split} {name}"), np.random.default_rng([7, place, split == "test"])
            labels = [_label(draw) for _ in range(_RECORDINGS[split])]
            words = [draw.choice(others) if label == _OTHER else label for label in labels]
            speakers = [
                hall.guest if split == "test" and at % 2 else draw.choice(hall.speakers) for at in range(len(words))
            ]
            voices = spoken(list(zip(speakers, words, strict=True)), draw)
            for number, (label, voice) in enumerate(zip(labels, voices, strict=True), 1):
                heard = heard_in(voice, hall.noise, hall.level * draw.uniform(0.5, 1.5), noise)
                where = f"keywords {split} {name} {number}"
                heard = heard[: int(_MOST_SECONDS * RATE)]
                yield Record(where, "", label=label, group=name, audio=wave_file(heard))


def _label(draw: random.Random) -> str:
    return _OTHER if draw.random() < _SHARE_OF_OTHER else draw.choice(_KEYWORDS)
