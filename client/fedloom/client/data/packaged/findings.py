"""Made-up clinical notes: which words are a finding, and whether the patient has it."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.findings_words import FILLERS, FINDINGS, STYLES, Style
from fedloom.client.data.records import Record

__all__ = ["Findings", "findings_of"]

_NOTES = {"train": 10_000, "test": 500}
"""Notes of each department."""
_SHARES = {"none": 1.0, "present": 4.0, "absent": 4.0, "possible": 2.0, "past": 2.0, "family": 1.5}
"""Weights with which a phrase is about findings of a label; `none` is about something else."""
_FOUND = re.compile(r"\{(and|or|nor)\}")

Tagged = list[tuple[str, str]]
"""Words with their labels."""


@dataclass(frozen=True)
class Findings:
    """Notes of four hospital departments, each in a style of its own; drawn from a seed, and nobody's.

    Every word of a finding is labelled: the patient has it (present), does not (absent), may have it (possible), had it
    (past), or a relative has it (family); other words have no label. Where the findings are is known, as in the
    assertion task of i2b2/VA 2010 (Uzuner et al., JAMIA 2011). No finding of a note that is held out occurs in one to
    train on: the words around it must tell.
    """

    task: ClassVar[str] = "token-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """The notes of one split, department by department, no two alike."""
        pool, seen = findings_of(split), set[str]()
        for name, style in STYLES.items():
            draw, count = random.Random(f"findings {split} {name}"), 0
            while count < _NOTES[split]:
                note = _note(style, pool, draw)
                words, tags = zip(*note, strict=True)
                text = " ".join(words)
                known = re.sub(r"\W+", " ", text.lower())  # a privacy account takes them for one, too
                if known not in seen and any(tags):
                    seen.add(known)
                    count += 1
                    yield Record(f"findings {split} {name} {count}", text, group=name, words=words, tags=tags)


def findings_of(split: Split) -> tuple[str, ...]:
    """The findings that notes of one split are about: every fourth is held out."""
    return FINDINGS[3::4] if split == "test" else tuple(each for at, each in enumerate(FINDINGS) if at % 4 != 3)


def _note(style: Style, pool: tuple[str, ...], draw: random.Random) -> Tagged:
    """One to three phrases."""
    note: Tagged = []
    for label in draw.choices(tuple(_SHARES), tuple(_SHARES.values()), k=draw.choice((1, 2, 2, 3))):
        if note:
            _join(note, draw.choice(style.ends))
        phrase = _phrase(style, label, pool, draw)
        if style.capitals and (not note or note[-1][0].endswith(".")):
            first, tag = phrase[0]
            phrase[0] = (first[0].upper() + first[1:], tag)
        note += phrase
    _join(note, ".")
    return note


def _join(note: Tagged, end: str) -> None:
    """What stands after a phrase: a mark at its last word, a word of its own, or both."""
    mark, _, word = end.rpartition(" ") if not end.isalpha() else ("", "", end)
    if not word.isalpha():
        mark, word = word, ""
    last, tag = note[-1]
    note[-1] = (last + mark, tag)
    if word:
        note.append((word, ""))


def _phrase(style: Style, label: str, pool: tuple[str, ...], draw: random.Random) -> Tagged:
    found: Tagged = []
    for piece in draw.choice(style.phrases[label]).split():
        if joint := _FOUND.fullmatch(piece):
            found += _listed(joint[1], label, pool, draw)
            continue
        while "{" in piece:
            name = piece[piece.index("{") + 1 : piece.index("}")]
            piece = piece.replace("{" + name + "}", draw.choice(style.who if name == "who" else FILLERS[name]), 1)
        found += [(word, "") for word in piece.split()]
    return found


def _listed(joint: str, label: str, pool: tuple[str, ...], draw: random.Random) -> Tagged:
    """One to three different findings, joined as in "fever, chills or cough"; two or three after "neither"."""
    chosen = draw.sample(pool, draw.choice((2, 3) if joint == "nor" else (1, 1, 1, 2, 2, 3)))
    words: Tagged = []
    for place, finding in enumerate(chosen):
        if place == len(chosen) - 1 and place:
            words.append((joint, ""))
        elif place:
            words[-1] = (words[-1][0] + ",", label)
        words += [(word, label) for word in finding.split()]
    return words
