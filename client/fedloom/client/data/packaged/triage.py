"""Made-up notes of emergency departments: how soon a patient has to be seen."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.made_up import distinct, filled, side
from fedloom.client.data.packaged.triage_words import COMPLAINTS, FILLERS, HOSPITALS, LEVELS, SIGNS, Hospital
from fedloom.client.data.records import Record

__all__ = ["Triage"]

_NOTES = {"train": 3000, "test": 300}
"""Notes of each hospital."""


@dataclass(frozen=True)
class Triage:
    """Notes of four emergency departments, each in a style of its own; drawn from a seed, and nobody's.

    The grade is that of the worst sign in the note, as with the discriminators of the Manchester triage system
    (Mackway-Jones et al., Emergency Triage, 2014). No complaint of a note that is held out occurs in one to train on,
    and every complaint comes with every grade: the signs must tell.
    """

    task: ClassVar[str] = "ordinal"

    def records(self, split: Split) -> Iterator[Record]:
        """The notes of one split, hospital by hospital, no two of a hospital alike."""
        for name, hospital in HOSPITALS.items():
            draw = random.Random(f"triage {split} {name}")
            rows = distinct(partial(_note, name, hospital, split, draw), _NOTES[split])
            for number, record in enumerate(rows, 1):
                yield record._replace(where=f"triage {split} {name} {number}")


def _note(name: str, hospital: Hospital, split: Split, draw: random.Random) -> Record:
    """What the patient came with, one sign of the grade, and some that are no worse."""
    grade = draw.choices(range(len(LEVELS)), hospital.mix)[0]
    kinds = draw.sample(sorted(SIGNS), draw.choice((2, 3, 3)))
    signs = []
    for place, kind in enumerate(kinds):
        at = grade if place == 0 else draw.randint(max(0, grade - 2), grade)
        signs.append(filled(draw.choice(SIGNS[kind][at]), FILLERS, draw))
    draw.shuffle(signs)
    fillers = {**FILLERS, "complaint": side(COMPLAINTS, split)}
    parts = [filled(draw.choice(hospital.openings), fillers, draw), *signs]
    if draw.random() < 0.4:
        parts.append(filled(draw.choice(hospital.closings), fillers, draw))
    if hospital.capitals:
        parts = [part[0].upper() + part[1:] for part in parts]
    return Record("", hospital.joint.join(parts) + ".", LEVELS[grade], name)
