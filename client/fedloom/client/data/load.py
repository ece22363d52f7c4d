"""Read a data set: a packaged one, or the files of a client."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from fedloom.client.data.images import fingerprint
from fedloom.client.data.packaged import Split
from fedloom.client.data.records import Layout, Record
from fedloom.client.data.rows import Indices, Rows
from fedloom.client.data.sources import source_rows
from fedloom.proto.errors import DataError
from fedloom.proto.run import Column, Task

__all__ = ["Split", "assembled", "class_index", "load_rows", "records"]

Skip = Callable[[str, DataError], None]
"""Gets the place and the fault of a row that is passed over."""


def load_rows(
    source: str,
    labels: tuple[str, ...],
    split: Split,
    task: Task = "text-classification",
    columns: Mapping[Column, str] | None = None,
) -> Rows:
    """The rows of one split of a data set.

    Args:
        source: A packaged data set, or a file or folder, see docs/data.md. Write ./sentiment for a folder of that name.
        labels: The label names. A row's label is one of them, or its index when no label has that name.
        split: Which part to read.
        task: What the rows are for; it says which columns are needed. group is optional, others are ignored.
        columns: The file's names of columns that are not called as the task calls them.

    Raises:
        DataError: The source is missing, cannot be fetched, is empty, or has a malformed row; the message
            says which line, what was found and what to do.
    """
    return assembled(records(source, split, Layout(task, columns or {})), labels, task, source)


def records(source: str, split: Split, layout: Layout, skip: Skip | None = None) -> Iterator[Record]:
    """The rows of one split one by one, each checked by itself; labels are not looked up.

    Args:
        source: See `load_rows`.
        split: Which part to read.
        layout: The task and its columns.
        skip: Called for a row that does not fit, which is then passed over; None raises.

    Raises:
        DataError: The source cannot be read, or a row does not fit and there is no `skip`.
    """
    for where, row in source_rows(source, split, layout):
        try:
            if isinstance(row, DataError):
                raise row
            record = row if isinstance(row, Record) else layout.read(row, where)
            if record.image:
                record = record._replace(text=fingerprint(record.image, where))
        except DataError as error:
            if skip is None:
                raise
            skip(where, error)
        else:
            yield record


def assembled(found: Iterable[Record], labels: tuple[str, ...], task: Task, source: str) -> Rows:
    """Records of one task as rows, their labels looked up.

    Raises:
        DataError: There are none, or a label is none of `labels`.
    """
    kept = list(found)
    if not kept:
        raise DataError(f"{source} has no rows; at least one is needed")
    texts, groups = tuple(record.text for record in kept), tuple(record.group for record in kept)
    none = np.zeros(len(kept), np.int64)
    index = class_index(labels)
    if task == "token-classification":
        words = tuple(record.words for record in kept)
        tags = tuple(_classes(record.tags, index, labels, record.where) for record in kept)
        return Rows(texts, none, groups, labels, task, words=words, tags=tags)
    if task == "causal-lm":
        return Rows(texts, none, groups, labels, task, prompts=tuple(record.prompt for record in kept))
    if task == "instruct":
        return Rows(texts, none, groups, labels, task, turns=tuple(record.turns for record in kept))
    own = np.concatenate([_classes((record.label,), index, labels, record.where) for record in kept])
    images = tuple(record.image for record in kept) if task == "image-classification" else ()
    return Rows(texts, own, groups, labels, task, images=images)


def class_index(labels: tuple[str, ...]) -> dict[str, int]:
    """The class of each label as it may be written in the data: by name, or by position if no label has that name."""
    return {str(i): i for i in range(len(labels))} | {name: i for i, name in enumerate(labels)}


def _classes(names: tuple[str, ...], index: dict[str, int], labels: tuple[str, ...], where: str) -> Indices:
    if not all(name in index for name in names):
        raise DataError(
            f"{where}: a label is not among those expected; use {_some(labels)} or an index from 0 to "
            f"{len(labels) - 1}, or correct data.labels of the policy (of a simulation, model.labels of the run). "
            "`fedloom data check` lists the labels that it finds"
        )
    return np.array([index[name] for name in names], np.int64)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} ... ({len(names)} in all)"
