"""Read a data set: a packaged one, or the files of a client."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedloom.client.data.files import Note
from fedloom.client.data.labels import Labelling, labelling
from fedloom.client.data.layout import Layout
from fedloom.client.data.media import audio, images
from fedloom.client.data.packaged.api import Split
from fedloom.client.data.records import Record
from fedloom.client.data.rows import IGNORED, Indices, Rows
from fedloom.client.data.sources import Found, source_rows
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError

__all__ = [
    "Split",
    "Tally",
    "Tell",
    "assembled",
    "identified",
    "load_rows",
    "read_rows",
    "records",
    "tallied",
    "tell_of",
]

K = TypeVar("K", str, Note)

log = logging.getLogger(__name__)

Skip = Callable[[str, DataError | Note], None]
"""Gets the place and the fault of a row that is passed over, or a note."""

Tell = Callable[[int, str], None]
"""Gets a level of `logging` and one line on what was read. It is exact, and stays on this machine."""


@dataclass
class Tally:
    """Things of one kind."""

    count: int
    first: str
    """Where the first of them is."""

    def __str__(self) -> str:
        """How many, and where the first is."""
        return f"{self.count:,} times, the first at {self.first}" if self.count > 1 else f"at {self.first}"


def tallied(tallies: dict[K, Tally], kind: K, where: str) -> None:
    """Count one more of a kind."""
    tallies.setdefault(kind, Tally(0, where)).count += 1


def _refuse(where: str, what: DataError | Note) -> None:
    if isinstance(what, DataError):
        raise what


def load_rows(
    source: str,
    labels: tuple[str, ...],
    split: Split,
    task: str = "text-classification",
    form: Form | None = None,
    *,
    tell: Tell = log.log,
) -> Rows:
    """The rows of one split of a data set.

    Args:
        source: A packaged data set, or a file or folder, see docs/data.md. Write ./sentiment for a folder of that name.
        labels: The label names. The labels of the rows are all of them such names, or all of them their positions.
        split: Which part to read.
        task: What the rows are for; it says which columns are needed. group is optional, others are ignored.
        form: How the files are to be read.
        tell: Gets a line on what was read and one on each kind of thing that was passed over.

    Raises:
        DataError: The source is missing, cannot be fetched, is empty, has a malformed row, or has labels that are
            names and positions alike; the message says which line, what was found and what to do.
    """
    form = form or Form()
    layout = Layout(task, form.columns)
    return read_rows(source_rows(source, split, layout), layout, labels, source, form, tell)


def read_rows(
    found: Iterable[Found], layout: Layout, labels: tuple[str, ...], source: str, form: Form, tell: Tell = log.log
) -> Rows:
    """What a source holds as rows, whatever kind of source it is; the arguments are those of `load_rows`.

    Raises:
        DataError: A row does not fit, there is none, or labels are names and positions alike.
    """
    notes: dict[Note, Tally] = {}

    def skip(where: str, what: DataError | Note) -> None:
        if isinstance(what, DataError):
            raise what
        tallied(notes, what, where)

    rows = assembled(_checked(found, layout, skip), labels, layout.task, source, form)
    tell(logging.INFO, f"{source}: {len(rows):,} rows read{_labelled(rows)}")
    tell_of(notes, tell)
    return rows


def _labelled(rows: Rows) -> str:
    return f"; {rows.labelling}" if rows.labelling else ""


def tell_of(notes: dict[Note, Tally], tell: Tell) -> None:
    """A line on each kind of note; a warning if its owner should look at it."""
    for note, tally in notes.items():
        line = f"{note.what}: {tally}"
        tell(*((logging.WARNING, f"{line}; {note.remedy}") if note.remedy else (logging.INFO, line)))


def records(source: str, split: Split, layout: Layout, skip: Skip = _refuse) -> Iterator[Record]:
    """The rows of one split one by one, each checked by itself; labels are not looked up.

    Args:
        source: See `load_rows`.
        split: Which part to read.
        layout: The task and its columns.
        skip: Called for a row that does not fit, which is then passed over, and for each note. By default a row that
            does not fit is raised.

    Raises:
        DataError: The source cannot be read, or a row does not fit and `skip` raises that.
    """
    yield from _checked(source_rows(source, split, layout), layout, skip)


def _checked(found: Iterable[Found], layout: Layout, skip: Skip) -> Iterator[Record]:
    for where, row in found:
        if isinstance(row, DataError | Note):
            skip(where, row)
            continue
        try:
            record = row if isinstance(row, Record) else layout.read(row, where)
            record = identified(record)
        except DataError as error:
            skip(where, error)
        else:
            yield record


def identified(record: Record) -> Record:
    """The row with what it is known by: of an image or a recording its fingerprint, of a text the text itself.

    Raises:
        DataError: It is no image, or no recording.
    """
    if record.audio:
        return record._replace(text=audio.fingerprint(record.audio, record.where))
    return record._replace(text=images.fingerprint(record.image, record.where)) if record.image else record


def assembled(found: Iterable[Record], labels: tuple[str, ...], task: str, source: str, form: Form) -> Rows:
    """Records of one task as rows, their labels looked up.

    Raises:
        DataError: There are none, a label is none of `labels`, or all are names and positions alike.
    """
    kept = list(found)
    if not kept:
        raise DataError(f"{source} has no rows; at least one is needed")
    kind, way, classes = task_named(task, labels), None, []
    if kind.traits.labels:
        try:
            way = labelling({label for record in kept for label in record.labels}, labels, form.labels_as)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error
        classes = [_classes(record, way) for record in kept]
    columns: dict[str, Any] = {"labels": np.zeros(len(kept), np.int64), **kind.columns(kept, classes, form.answers)}
    return Rows(
        tuple(record.text for record in kept),
        groups=tuple(record.group for record in kept),
        label_names=labels,
        task=task,
        places=tuple(record.where for record in kept),
        labelling=way,
        **columns,
    )


def _classes(record: Record, way: Labelling) -> Indices:
    labels = record.tags or record.labels
    found = [way.class_of(label) if label else IGNORED for label in labels]
    if None in found:
        raise DataError(
            f"{record.where}: a label is not among those expected; use {_some(way.names)}, or throughout an index from "
            f"0 to {len(way.names) - 1}, or correct data.labels of the policy (of a simulation, model.labels of the "
            "run). `fedloom data check` lists the labels that it finds"
        )
    return np.array(found, np.int64)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} ... ({len(names)} in all)"
