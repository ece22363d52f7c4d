"""What a data set holds, counted for its owner alone: nothing here is ever sent."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.files import Note
from fedloom.client.data.labels import Labelling, labelling
from fedloom.client.data.layout import Layout
from fedloom.client.data.load import Tally, assembled, records, tallied
from fedloom.client.data.media.images import brightest
from fedloom.client.data.records import Record
from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.data.sources import source_rows
from fedloom.client.data.tokens import attempted
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError
from fedloom.core.registry import entries

__all__ = ["Lengths", "Survey", "guess_task", "lengths", "survey"]

# Two or three characters that a Latin-1 or Windows reading makes of one in UTF-8: the A with tilde or the a with
# circumflex and what may follow it.
_MISREAD = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u0080\u20ac][\u0080-\u00bf\u2018-\u201e\u2122\u0153]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_ENDLESS = 1 << 30


@dataclass
class Survey:
    """Figures of one data set under one task. They are exact, and so no business of anybody but the owner."""

    task: str
    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """Known labels by name, of rows or, for token-classification, of words."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Labels that are not expected, likewise."""
    unreadable: dict[str, Tally] = field(default_factory=dict)
    """By what is wrong: training refuses the data set as long as it has such a row."""
    doubtful: dict[str, Tally] = field(default_factory=dict)
    """By what is odd: training takes such rows."""
    notes: dict[Note, Tally] = field(default_factory=dict)
    """All that is in the source and no row."""
    labelling: Labelling | None = None
    """How labels are read, where there are any and names for them."""
    groups: int = 0
    deep: list[int] = field(default_factory=list)
    """The greatest value of each picture of 16 bits."""
    usable: list[Record] = field(default_factory=list, repr=False)
    """Rows that training takes."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows under a model's tokenizer, special tokens included."""

    median: int
    ninety_fifth: int
    longest: int
    cut: int
    """Rows that lose their end at the run's model.max_length."""
    idle: int
    """Rows of which nothing to learn is left then."""
    refused: dict[str, Tally]
    """Rows that the tokenizer or its chat template cannot take, by why."""


def guess_task(source: str, form: Form) -> str:
    """The task that the columns of the first row suit; of several the one that needs most of them, or the usual one.

    Raises:
        DataError: There is no row, or none suits.
    """
    faults: list[DataError] = []
    suited: list[tuple[int, bool, bool, str]] = []
    for task, entry in entries("tasks").items():
        layout = Layout(task, form.columns)
        found = (row for _, row in source_rows(source, "train", layout) if not isinstance(row, Note))
        try:
            row = next(found, DataError(f"{source} has no rows"))
        except DataError as error:
            faults.append(error)
            continue
        if isinstance(row, DataError):
            faults.append(row)
        elif isinstance(row, Record) or not layout.missing(row):
            needed = () if isinstance(row, Record) else layout.needed(row)
            suited.append((-len(needed), not task_named(task).traits.usual, not entry.ours, task))
    if suited:
        return min(suited)[3]
    if faults:
        raise faults[0]
    raise DataError(f"{source} has no columns of a task; see docs/data.md, or name them in data.columns")


def survey(source: str, labels: tuple[str, ...], task: str, form: Form) -> Survey:
    """Read all training rows and count.

    Args:
        source: As in the policy.
        labels: The label names that are expected; none takes every label as known.
        task: What the rows are for.
        form: How the files are to be read.

    Raises:
        DataError: The source cannot be read at all.
    """
    found = Survey(task)
    seen: set[bytes] = set()
    groups: set[str] = set()

    def skip(where: str, what: DataError | Note) -> None:
        if isinstance(what, Note):
            tallied(found.notes, what, where)
            return
        found.rows += 1
        tallied(found.unreadable, str(what).removeprefix(where).lstrip(": "), where)

    kept: list[Record] = []
    for record in records(source, "train", Layout(task, form.columns), skip):
        found.rows += 1
        groups.add(record.group)
        if record.image and (most := brightest(record.image)) is not None:
            found.deep.append(most)
        for oddity in _oddities(record, seen):
            tallied(found.doubtful, oddity, record.where)
        kept.append(record)
    found.groups = len(groups - {""})
    if labels and kept:
        try:
            found.labelling = labelling({label for record in kept for label in record.labels}, labels, form.labels_as)
        except DataError as error:
            found.unreadable[str(error)] = Tally(len(kept), kept[0].where)
            labels = ()  # nothing can be said of each
            kept, found.labels = [], Counter(label for record in kept for label in record.labels)
    for record in kept:
        if _classified(record, found):
            found.usable.append(record)
    return found


def _classified(record: Record, found: Survey) -> bool:
    """Count the labels of a row; whether all are known."""
    known = True
    for label in record.labels:
        place = found.labelling.class_of(label) if found.labelling else None
        if found.labelling is None:
            found.labels[label] += 1
        elif place is not None:
            found.labels[found.labelling.names[place]] += 1
        else:
            found.unknown[label] += 1
            known = False
    return known


def _oddities(record: Record, seen: set[bytes]) -> list[str]:
    found = []
    identity = hashlib.sha256(record.text.encode()).digest()
    if identity in seen:
        found.append("the same content again: each copy counts as an example of its own, and is protected as one")
    seen.add(identity)
    if "\ufffd" in record.text:
        found.append("has the character that stands for a lost one (U+FFFD); export the data again as UTF-8")
    if _MISREAD.search(record.text):
        found.append("looks like UTF-8 that was read as Latin-1; export the data again as UTF-8")
    if _CONTROLS.search(record.text):
        found.append("has control characters; remove them")
    return found


def lengths(
    found: Survey, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int, form: Form
) -> Lengths:
    """Count the tokens of the usable rows.

    Raises:
        DataError: There are none.
    """
    form = form.model_copy(update={"labels_as": found.labelling and found.labelling.labels_as})
    rows: Rows = assembled(found.usable, labels, found.task, "the data", form)
    encoded, faults = attempted(rows, tokenizer, _ENDLESS)
    refused: dict[str, Tally] = {}
    for index, error in faults.items():
        tallied(refused, str(error), rows.place(index))
    counts = np.array([encoded.length(index) for index in range(len(encoded)) if index not in faults] or [0])
    # At the cut of a language model, the last place has nobody to predict.
    read = max_length - task_named(found.task).traits.generates
    sound = [index for index in range(len(encoded)) if encoded.targets and index not in faults]
    idle = sum(all((part[:read] == IGNORED).all() for part in encoded.targets[encoded.own(index)]) for index in sound)
    median, ninety_fifth = (int(np.percentile(counts, share)) for share in (50, 95))
    return Lengths(median, ninety_fifth, int(counts.max()), int((counts > max_length).sum()), idle, refused)
