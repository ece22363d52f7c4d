"""What a data source is: a packaged data set, a file, or a folder, and the rows in it."""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedloom.client.data.arrow import parquet_rows, saved_rows
from fedloom.client.data.files import Row, csv_rows, jsonl_rows
from fedloom.client.data.images import folder_rows
from fedloom.client.data.packaged import PACKAGED, Split
from fedloom.client.data.records import Layout, Record
from fedloom.proto.errors import DataError

__all__ = ["source_rows"]

_READERS: dict[str, Callable[[Path, Layout], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
}


def source_rows(source: str, split: Split, layout: Layout) -> Iterator[tuple[str, dict[str, Any] | Record | DataError]]:
    """The rows of one split: where each is, and its columns, or what is wrong with it.

    Raises:
        DataError: There is no such source, or it cannot be read; the message says what to do.
    """
    if source in PACKAGED:
        packaged = PACKAGED[source]
        if packaged.task != layout.task:
            raise DataError(
                f"data source {source!r} is for {packaged.task}, not {layout.task}; name a file or a folder"
            )
        yield from ((record.where, record) for record in packaged.records(split))
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path, split, layout)
        return
    if not path.is_file():
        near = difflib.get_close_matches(source, PACKAGED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"name a file, a folder or one of {', '.join(PACKAGED)}"
        raise DataError(f"data source {source!r} does not exist; {hint}")
    if path.suffix not in _READERS:
        raise DataError(f"data file {source} ends in {path.suffix!r}; {_one_of(list(_READERS))} is needed")
    if split == "test":
        raise DataError(f"{source} is one file, all of it training data; give a folder with train and test files")
    yield from _table(path, layout)


def _folder(folder: Path, split: Split, layout: Layout) -> Iterator[Row]:
    """A folder of files, of a saved data set, or of pictures."""
    part = folder / split
    if (folder / "state.json").is_file() or (part / "state.json").is_file():
        saved = part if (part / "state.json").is_file() else folder
        if saved == folder and split == "test":
            raise DataError(
                f"{folder} is one data set, all of it training data; save a DatasetDict with train and test"
            )
        yield from saved_rows(saved, layout)
        return
    files = [folder / f"{split}{suffix}" for suffix in _READERS if (folder / f"{split}{suffix}").is_file()]
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if len(files) + bool(shards) > 1:
        names = [path.name for path in files] + [f"{split}-*.parquet"] * bool(shards)
        raise DataError(f"folder {folder} has {' and '.join(names)}; exactly one of them is needed")
    if files or shards:
        for path in files or shards:
            yield from _table(path, layout)
    elif layout.task == "image-classification":
        yield from _pictures(folder, split, layout)
    else:
        names = [f"{split}{suffix}" for suffix in _READERS]
        raise DataError(f"folder {folder} has none of {', '.join(names)}; exactly one of them is needed")


def _pictures(folder: Path, split: Split, layout: Layout) -> Iterator[Row]:
    """The pictures of SPLIT/CLASS folders; without a train folder all CLASS folders are training data."""
    if (folder / split).is_dir():
        folder = folder / split
    elif split == "test" or (folder / "test").is_dir():
        raise DataError(f"folder {folder} has no folder {split}; pictures belong in {split}/CLASS/")
    count = 0
    for row in folder_rows(folder, layout.name("image"), layout.name("label")):
        count += 1
        yield row
    if not count:
        raise DataError(
            f"folder {folder} has no pictures in a folder for each class, nor a {split} file; put them in CLASS/ "
            "folders, whose names are the labels"
        )


def _table(path: Path, layout: Layout) -> Iterator[Row]:
    for where, row in _READERS[path.suffix](path, layout):
        if isinstance(row, DataError) or layout.task != "image-classification":
            yield where, row
        else:
            yield where, _with_picture(row, layout.name("image"), path.parent, where)


def _with_picture(row: dict[str, Any], column: str, folder: Path, where: str) -> dict[str, Any] | DataError:
    """The row with the picture's bytes in place of its path, which counts from the table's folder and stays below."""
    value = row.get(column)
    name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if not isinstance(name, str):
        return row
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return DataError(f"{where}: the picture lies outside the table's folder; give a path below {folder}")
    try:
        return {**row, column: path.read_bytes()}
    except OSError as error:
        return DataError(f"{where}: its picture cannot be read: {error.strerror}; correct the path below {folder}")


def _one_of(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
