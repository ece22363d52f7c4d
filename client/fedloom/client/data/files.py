"""The rows of text files: .csv, .tsv and .jsonl, one at a time, with the place of each."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.client.data.records import LAYOUTS, Layout
from fedloom.proto.errors import DataError

__all__ = ["Row", "check_columns", "csv_rows", "jsonl_rows", "readable"]

Row = tuple[str, dict[str, Any] | DataError]
"""Where a row is, and its columns by the names that the file gives them, or what is wrong with it alone."""

# A document of a megabyte in one field is data, and no mistake.
csv.field_size_limit(1 << 30)


def check_columns(path: Path, present: list[str], layout: Layout) -> None:
    """Refuse a table that lacks a column of the task.

    Raises:
        DataError: It does.
    """
    if missing := layout.missing(present):
        raise DataError(
            f"{path} has the columns {', '.join(present) or '(none)'} but not {' and '.join(missing)}; name "
            f"{LAYOUTS[layout.task]} and, optionally, group in its first line, or say in data.columns which are meant"
        )


def csv_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a .csv or .tsv file.

    Raises:
        DataError: It cannot be read, or lacks a column.
    """
    if layout.task == "token-classification":
        raise DataError(
            f"{path}: tokens and tags are lists, which a CSV file has no place for; write a .jsonl or .parquet file"
        )
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # utf-8-sig: spreadsheets put a byte-order mark in front, which would become part of the first column's name.
    with readable(path), path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True, delimiter=delimiter)
        try:
            columns = list(reader.fieldnames or ())
            check_columns(path, columns, layout)
            trimmed = [layout.name(column) for column in ("label", "group", "image")]
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or any(row[layout.name(column)] is None for column in layout.needed(columns)):
                    yield (
                        where,
                        DataError(f"{where}: {len(columns)} fields are needed, as in the first line; quote commas"),
                    )
                    continue
                yield where, {**row, **{name: row[name].strip() for name in trimmed if row.get(name)}}
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not valid CSV: {error}; correct it") from error


def jsonl_rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a .jsonl file, an object on each line; empty lines are passed over.

    Raises:
        DataError: It cannot be read.
    """
    with readable(path), path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, DataError(f"{where} is not valid JSON: {error}; write one object on each line")
                continue
            if not isinstance(row, dict):
                row = DataError(f"{where} is not an object; write one with {LAYOUTS[layout.task]}")
            yield where, row


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
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
