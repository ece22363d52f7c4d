"""What a data source is: a packaged data set, a file, or a folder, and the rows in it."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedloom.client.data.arrow import parquet_rows, saved_rows
from fedloom.client.data.files import Note, Row, csv_rows, jsonl_rows, readable
from fedloom.client.data.layout import Layout
from fedloom.client.data.media.folders import HIDDEN, Kind, folder_rows, kind_of
from fedloom.client.data.packaged.api import DataSource, Split
from fedloom.client.data.records import Record
from fedloom.client.tasks.api import task_named
from fedloom.core.errors import DataError
from fedloom.core.registry import build, entries
from fedloom.core.spelling import meant

__all__ = ["Found", "source_rows"]

Found = tuple[str, dict[str, Any] | Record | DataError | Note]
"""Where something is: a row by column, or one that is read already; what is wrong with one; or a note."""

_BESIDE = Note("a file or folder beside the data, passed over")

_READERS: dict[str, Callable[[Path, Layout], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
}


def source_rows(source: str, split: Split, layout: Layout) -> Iterator[Found]:
    """The rows of one split: where each is, and its columns, or what is wrong with it; and notes on all else there is.

    Raises:
        DataError: There is no such source, or it cannot be read; the message says what to do.
    """
    packaged_names = entries("data")
    if source in packaged_names:
        packaged: DataSource = build("data", source, {})
        if packaged.task != layout.task:
            raise DataError(
                f"data source {source!r} is for {packaged.task}, not {layout.task}; name a file or a folder"
            )
        yield from ((record.where, record) for record in packaged.records(split))
        return
    path = Path(source)
    if os.path.isdir(source):
        yield from _folder(path, split, layout)
        return
    if not os.path.isfile(source):
        hint = meant(source, packaged_names) or f"name a file, a folder or one of {', '.join(packaged_names)}"
        raise DataError(f"data source {source!r} does not exist; {hint}")
    if path.suffix.lower() not in _READERS:
        raise DataError(f"data file {source} ends in {path.suffix!r}; {_one_of(list(_READERS))} is needed")
    if split == "test":
        raise DataError(f"{source} is one file, all of it training data; give a folder with train and test files")
    yield from _table(path, layout)


def _folder(folder: Path, split: Split, layout: Layout) -> Iterator[Row]:
    """A folder of tables, of a saved data set, or of files in a folder for each class."""
    part = folder / split
    if (folder / "state.json").is_file() or (part / "state.json").is_file():
        saved = part if (part / "state.json").is_file() else folder
        if saved == folder and split == "test":
            raise DataError(
                f"{folder} is one data set, all of it training data; save a DatasetDict with train and test"
            )
        yield from saved_rows(saved, layout)
        return
    with readable(folder):
        present = sorted(folder.iterdir())
    files = [path for path in present if path.stem == split and _is_table(path)]
    shards = [path for path in present if path.name.startswith(f"{split}-") and path.suffix.lower() == ".parquet"]
    if len(files) + bool(shards) > 1:
        names = [path.name for path in files] + [f"{split}-*.parquet"] * bool(shards)
        raise DataError(f"folder {folder} has {' and '.join(names)}; exactly one of them is needed")
    if files or shards:
        _check_shards(shards)
        yield from _others(split, [path for path in present if path not in (*files, *shards)], layout)
        for path in files or shards:
            yield from _table(path, layout)
    elif (kind := _kind(layout)) and not layout.missing((layout.name(kind.column), layout.name("label"))):
        yield from _by_class(folder, split, layout, kind)
    else:
        names = [f"{split}{suffix}" for suffix in _READERS]
        raise DataError(f"folder {folder} has none of {', '.join(names)}; exactly one of them is needed")


def _kind(layout: Layout) -> Kind | None:
    """What the files of the task's rows are; None where rows are texts."""
    return kind_of(task_named(layout.task).traits)


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in _READERS and path.is_file()


def _check_shards(shards: list[Path]) -> None:
    """Refuse a data set that lacks a part, by the number of parts in the names, such as train-00000-of-00002.parquet.

    Raises:
        DataError: It does.
    """
    for path in shards:
        count = re.search(r"-of-(\d{1,9})\.parquet$", path.name, re.IGNORECASE)
        if count and len(shards) != int(count[1]):
            raise DataError(f"{path} is one of {int(count[1])} files and {len(shards)} are there; copy all of them")


def _others(split: Split, paths: list[Path], layout: Layout) -> Iterator[Row]:
    """Notes on what lies in a folder beside the tables that are read."""
    kind = _kind(layout)
    for path in paths:
        if _is_table(path) and _beside(path, split) == _BESIDE:
            yield str(path), Note(f"a table that is not called {split}", f"add its rows to {split}, or move it away")
        elif kind is None or not (path.is_dir() or path.suffix.lower() in kind.suffixes):
            yield str(path), _beside(path, split)


def _beside(path: Path, split: Split) -> Note:
    """What lies in a data set's folder and is not read."""
    other = "test" if split == "train" else "train"
    if path.name.startswith("."):
        return HIDDEN
    return Note(f"{other} data, not read here") if re.split(r"[.-]", path.name)[0] == other else _BESIDE


def _by_class(folder: Path, split: Split, layout: Layout, kind: Kind) -> Iterator[Row]:
    """The files of SPLIT/CLASS folders; without a train folder all CLASS folders are training data."""
    if (folder / split).is_dir():
        with readable(folder):
            beside = sorted(path for path in folder.iterdir() if path.name != split)
        yield from ((str(path), _beside(path, split)) for path in beside)
        folder = folder / split
    elif split == "test" or (folder / "test").is_dir():
        raise DataError(f"folder {folder} has no folder {split}; {kind.name}s belong in {split}/CLASS/")
    count = 0
    for where, row in folder_rows(folder, kind, layout.name(kind.column), layout.name("label")):
        count += not isinstance(row, Note)
        yield where, row
    if not count:
        raise DataError(
            f"folder {folder} has no {kind.name}s in a folder for each class, nor a {split} file; put them in CLASS/ "
            "folders, whose names are the labels"
        )


def _table(path: Path, layout: Layout) -> Iterator[Row]:
    kind = _kind(layout)
    for where, row in _READERS[path.suffix.lower()](path, layout):
        if kind is None or isinstance(row, DataError | Note):
            yield where, row
        else:
            yield where, _with_file(row, layout.name(kind.column), path.parent, where)


def _with_file(row: dict[str, Any], column: str, folder: Path, where: str) -> dict[str, Any] | DataError:
    """The row with a file's bytes in place of its path, which counts from the table's folder and stays below."""
    value = row.get(column)
    name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if not isinstance(name, str):
        return row
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL in it, or links that lead in a circle
        return DataError(f"{where}: its file has no path that can be followed; correct it")
    if not path.is_relative_to(folder.resolve()):
        return DataError(f"{where}: the file lies outside the table's folder; give a path below {folder}")
    try:
        return {**row, column: path.read_bytes()}
    except OSError as error:
        return DataError(f"{where}: its file cannot be read: {error.strerror}; correct the path below {folder}")


def _one_of(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
