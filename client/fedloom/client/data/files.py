"""The rows of text files: .csv, .tsv and .jsonl, one at a time, with the place of each."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.client.data.layout import Layout
from fedloom.core.errors import DataError

__all__ = ["EMPTY_LINE", "Note", "Row", "check_columns", "csv_rows", "jsonl_rows", "readable"]


class Note(NamedTuple):
    """Something in a source that is no row of its own: what was passed over, or an odd way to write a row."""

    what: str
    remedy: str = ""
    """What its owner should look at; nothing where it is as it should be."""


EMPTY_LINE = Note("an empty line, passed over")

_SEVERAL_LINES = Note("a row of several lines")

_UNCLOSED = Note(
    "a row of several lines, each of which would be a row by itself",
    "if a quotation mark there is part of the text, write it twice and the field in quotation marks",
)

Row = tuple[str, dict[str, Any] | DataError | Note]
"""Where something is: a row, as columns by the names that the file gives them; what is wrong with one row; or a note.
Everything in a file is one of these or part of a row."""

# A document of a megabyte in one field is data, and no mistake.
csv.field_size_limit(1 << 30)


def check_columns(path: Path | str, present: list[str], layout: Layout) -> None:
    """Refuse a table that lacks a column of the task or has it twice.

    Raises:
        DataError: It does.
    """
    if missing := layout.missing(present):
        raise DataError(
            f"{path} has the columns {', '.join(present) or '(none)'} but not {' and '.join(missing)}; name "
            f"{layout.columns} and, optionally, group in its first line, or say in data.columns which are meant"
        )
    if twice := [name for name in layout.wanted(present) if present.count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]} {present.count(twice[0])} times; rename all but one")


def csv_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a .csv or .tsv file.

    In a .csv file a field in quotation marks may hold commas and line breaks. A .tsv file is read in the same way,
    unless that would join lines of which each is a row by itself: then quotation marks are part of its texts.

    Raises:
        DataError: It cannot be read, lacks a column, or has one twice.
    """
    if "tags" in layout.needed(()):
        raise DataError(
            f"{path}: tokens and tags are lists, which a CSV file has no place for; write a .jsonl or .parquet file"
        )
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    bare = delimiter == "\t" and _bare(path)
    if bare:
        yield str(path), Note("a file without quoted fields: quotation marks in it are part of the text")
    lines: list[str] = []  # of the row that is being read
    # utf-8-sig: spreadsheets put a byte-order mark in front, which would become part of the first column's name.
    with readable(path), path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(
            _kept(stream, lines),
            strict=True,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL,
        )
        try:
            columns = next(reader, [])
            check_columns(path, columns, layout)
            lines.clear()
            for fields in reader:
                where = f"{path} line {reader.line_num + 1 - len(lines)}"
                if len(lines) > 1:
                    alone = len(columns) > 1 and all(line.count(delimiter) == len(columns) - 1 for line in lines)
                    yield where, _UNCLOSED if alone else _SEVERAL_LINES
                yield where, _table_row(where, columns, fields, layout)
                lines.clear()
        except csv.Error as error:
            where = f"{path} line {reader.line_num + 1 - max(1, len(lines))}"
            raise DataError(
                f"{where}: the row that begins there is not valid CSV: {error}; look whether a quotation mark is not "
                "closed, and write one that is part of the text twice"
            ) from error


def _table_row(where: str, columns: list[str], fields: list[str], layout: Layout) -> dict[str, Any] | DataError | Note:
    """What the fields of a table's row are. Those at its end may be left out, as spreadsheets do, if none is needed."""
    if not fields:
        return EMPTY_LINE
    row: dict[str, Any] = dict(zip(columns, fields, strict=False))
    if len(fields) > len(columns) or not {layout.name(column) for column in layout.needed(columns)} <= row.keys():
        return DataError(f"{where}: {len(columns)} fields are needed, as in the first line; quote commas")
    trimmed = [layout.name(column) for column in ("label", "group", "image")]
    return {**row, **{name: row[name].strip() for name in trimmed if name in row}}


def _bare(path: Path) -> bool:
    """Whether every line is a row by itself and reading quoted fields would make fewer rows, or none."""
    with readable(path), path.open(encoding="utf-8-sig", newline="") as stream:
        lines = [line for line in stream if line.strip("\r\n")]
    widths = {line.count("\t") for line in lines}
    if len(widths) != 1 or widths == {0}:
        return False
    try:
        return sum(1 for _ in csv.reader(lines, strict=True, delimiter="\t")) < len(lines)
    except csv.Error:
        return True


def _kept(stream: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in stream:
        lines.append(line)
        yield line


def jsonl_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a .jsonl file, an object on each line.

    Raises:
        DataError: It cannot be read.
    """
    with readable(path), path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path} line {number}"
            if not line.strip():
                yield where, EMPTY_LINE
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except DataError as error:
                yield where, DataError(f"{where} {error}")
                continue
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where} is not valid JSON: {error}; write one object on each line")
                continue
            if not isinstance(row, dict):
                row = DataError(f"{where} is not an object; write one with {layout.columns}")
            yield where, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ: of two values for one, either would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError("has an object with the same name twice; keep one of them")
    return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a text file raises into an error with a remedy.

    Raises:
        DataError: The file is not UTF-8 or cannot be read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 (it has a byte 0x{byte:02x} out of place); save it as UTF-8") from error
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(f"{path} cannot be read: {why}; check that it is whole, and its permissions") from error
