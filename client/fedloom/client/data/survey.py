"""What a data set holds, counted for its owner alone: nothing here is ever sent."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.load import assembled, class_index, records
from fedloom.client.data.records import Layout, Record
from fedloom.client.data.rows import Rows
from fedloom.client.data.sources import source_rows
from fedloom.client.data.tokens import IGNORED, encode
from fedloom.proto.errors import DataError
from fedloom.proto.run import Column, Task

__all__ = ["Fault", "Lengths", "Survey", "guess_task", "lengths", "survey"]

_TRIED: tuple[Task, ...] = (
    "text-classification",
    "image-classification",
    "token-classification",
    "causal-lm",
    "instruct",
)

# Two or three characters that a Latin-1 or Windows reading makes of one in UTF-8: the A with tilde or the a with
# circumflex and what may follow it.
_MISREAD = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u0080\u20ac][\u0080-\u00bf\u2018-\u201e\u2122\u0153]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_ENDLESS = 1 << 30


@dataclass
class Fault:
    """One thing that is wrong with some rows."""

    rows: int
    first: str
    """Where the first of them is."""


@dataclass
class Survey:
    """Figures of one data set under one task. They are exact, and so no business of anybody but the owner."""

    task: Task
    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """Known labels by name, of rows or, for token-classification, of words."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Labels that are not expected, likewise."""
    unreadable: dict[str, Fault] = field(default_factory=dict)
    """By what is wrong: training refuses the data set as long as it has such a row."""
    doubtful: dict[str, Fault] = field(default_factory=dict)
    """By what is odd: training takes such rows."""
    groups: int = 0
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


def guess_task(source: str, columns: Mapping[Column, str]) -> Task:
    """The first task that the columns of the first row suit.

    Raises:
        DataError: There is no row, or none suits.
    """
    faults: list[DataError] = []
    for task in _TRIED:
        layout = Layout(task, columns)
        try:
            _, row = next(source_rows(source, "train", layout), ("", DataError(f"{source} has no rows")))
        except DataError as error:
            faults.append(error)
            continue
        if isinstance(row, DataError):
            faults.append(row)
        elif isinstance(row, Record) or not layout.missing(row):
            return task
    if faults:
        raise faults[0]
    raise DataError(f"{source} has no columns of a task; see docs/data.md, or name them in data.columns")


def survey(source: str, labels: tuple[str, ...], layout: Layout) -> Survey:
    """Read all training rows and count.

    Args:
        source: As in the policy.
        labels: The label names that are expected; none takes every label as known.
        layout: The task and its columns.

    Raises:
        DataError: The source cannot be read at all.
    """
    found = Survey(layout.task)
    seen: set[bytes] = set()
    groups: set[str] = set()
    index = class_index(labels)

    def skip(where: str, error: DataError) -> None:
        found.rows += 1
        _note(found.unreadable, str(error).removeprefix(where).lstrip(": "), where)

    for record in records(source, "train", layout, skip):
        found.rows += 1
        groups.add(record.group)
        for oddity in _oddities(record, seen):
            _note(found.doubtful, oddity, record.where)
        known = True
        for label in record.tags or ((record.label,) if record.label else ()):
            name = labels[index[label]] if label in index else label
            known &= not labels or label in index
            (found.labels if not labels or label in index else found.unknown)[name] += 1
        if known:
            found.usable.append(record)
    found.groups = len(groups - {""})
    return found


def _note(faults: dict[str, Fault], what: str, where: str) -> None:
    faults.setdefault(what, Fault(0, where)).rows += 1


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


def lengths(found: Survey, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Lengths:
    """Count the tokens of the usable rows.

    Raises:
        DataError: There are none, or one gives no token or does not fit the chat template.
    """
    rows: Rows = assembled(found.usable, labels, found.task, "the data")
    encoded = encode(rows, tokenizer, _ENDLESS)
    counts = np.array([len(ids) for ids in encoded.input_ids])
    idle = sum(bool((targets[:max_length] == IGNORED).all()) for targets in encoded.targets)
    # At the cut, the last place has nobody to predict.
    if found.task in ("causal-lm", "instruct"):
        idle = sum(bool((targets[: max_length - 1] == IGNORED).all()) for targets in encoded.targets)
    median, ninety_fifth = (int(np.percentile(counts, share)) for share in (50, 95))
    return Lengths(median, ninety_fifth, int(counts.max()), int((counts > max_length).sum()), idle)
