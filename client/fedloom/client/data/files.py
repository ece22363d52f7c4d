"""A client's own .csv and .jsonl files, read row by row as the records of one task."""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fedloom.proto.errors import DataError
from fedloom.proto.run import Task

__all__ = ["SUFFIXES", "Record", "file_records"]


class Record(NamedTuple):
    """One row as read, before its labels are looked up."""

    where: str
    text: str
    """The whole content, see `Rows.texts`."""
    label: str = ""
    group: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    prompt: str = ""


def file_records(path: Path, task: Task) -> Iterator[Record]:
    """The rows of a .csv or .jsonl file.

    Raises:
        DataError: The file cannot be read or a row does not fit the task; the message says which line, what was
            found and what to do.
    """
    try:
        yield from _READERS[path.suffix](path, task)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 (it has a byte 0x{byte:02x} out of place); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _csv_records(path: Path, task: Task) -> Iterator[Record]:
    if task == "token-classification":
        raise DataError(f"{path}: tokens and tags are lists, which a CSV file has no place for; write a .jsonl file")
    # utf-8-sig: spreadsheets put a byte-order mark in front, which would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = reader.fieldnames or ()
            needed = _needed(task, columns)
            if missing := [name for name in needed if name not in columns]:
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or '(none)'} but not {' and '.join(missing)}; "
                    f"its first line must name {_LAYOUTS[task]} and, optionally, group"
                )
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or any(row[name] is None for name in needed):
                    raise DataError(f"{where}: {len(columns)} fields are needed, as in the first line; quote commas")
                trimmed = {name: row[name].strip() for name in ("label", "group") if row.get(name)}
                yield _record({**row, **trimmed}, where, task)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not valid CSV: {error}; correct it") from error


def _jsonl_records(path: Path, task: Task) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON: {error}; write one object on each line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is not an object; write one with {_LAYOUTS[task]}")
            yield _record(row, where, task)


_READERS: dict[str, Callable[[Path, Task], Iterator[Record]]] = {".csv": _csv_records, ".jsonl": _jsonl_records}

SUFFIXES = tuple(_READERS)
"""Ends of the names of files that can be read."""

_LAYOUTS: dict[Task, str] = {
    "text-classification": "text and label",
    "token-classification": "tokens and tags",
    "causal-lm": "text, or prompt and completion",
}


def _needed(task: Task, present: Collection[str]) -> tuple[str, ...]:
    """The columns a row of `task` must have; the two layouts of causal-lm are told apart by what is present."""
    if task == "text-classification":
        return "text", "label"
    if task == "token-classification":
        return "tokens", "tags"
    return ("prompt", "completion") if "prompt" in present or "completion" in present else ("text",)


def _record(row: Mapping[str, object], where: str, task: Task) -> Record:
    """One row, checked.

    A row with the contents of two tasks is refused: the same person's words would get a second privacy account
    when a coordinator asks for the other task.
    """
    needed = _needed(task, row)
    for name in needed:
        if name not in row:
            raise DataError(f"{where} has no {name!r}; {_LAYOUTS[task]} are needed, group is optional")
    contents = [name for name in ("text", "prompt") if isinstance(row.get(name), str)]
    contents += ["tokens"] if isinstance(row.get("tokens"), list) else []
    if len(contents) > 1:
        raise DataError(f"{where} has both {' and '.join(contents)}; keep one, so that the row has one privacy account")
    group = _string(row, "group", where) if row.get("group") is not None else ""
    if task == "token-classification":
        words, tags = _words(row["tokens"], where), _tags(row["tags"], where)
        if len(words) != len(tags):
            raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags; every token needs one tag")
        return Record(where, " ".join(words), group=group, words=words, tags=tags)
    if needed == ("prompt", "completion"):
        prompt, completion = _string(row, "prompt", where), _string(row, "completion", where)
        if not completion.strip():
            raise DataError(f"{where}: the completion is empty; fill it in or remove the row")
        return Record(where, prompt + completion, group=group, prompt=prompt)
    text = _string(row, "text", where)
    return Record(where, text, _label(row["label"], where) if task == "text-classification" else "", group)


def _string(row: Mapping[str, object], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string; found {value!r:.60}")
    return value


def _label(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: label {value!r:.60} must be a label name or its index")
    return str(value)


def _words(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word.strip() for word in value):
        raise DataError(f"{where}: tokens must be a list of words, none of them empty; found {value!r:.60}")
    return tuple(value)


def _tags(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: tags must be a list with one label for each token; found {value!r:.60}")
    return tuple(_label(tag, where) for tag in value)
