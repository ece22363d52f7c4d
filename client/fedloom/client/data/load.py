"""Read labelled texts: packaged data sets, and the CSV and JSONL files of a client."""

import csv
import difflib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fedloom.client.assets import fetch
from fedloom.client.data.rows import Rows
from fedloom.proto.errors import DataError

__all__ = ["PACKAGED", "Split", "load_rows"]

Split = Literal["train", "test"]

_HELD_OUT = 0.15


class _Record(NamedTuple):
    """One row as read, before its label is looked up."""

    where: str
    text: str
    label: str
    group: str


class _Sentence(NamedTuple):
    """A record and the unit (article, review, text) that must stay on one side of a split."""

    record: _Record
    unit: str


def load_rows(source: str, labels: tuple[str, ...], split: Split) -> Rows:
    """The rows of one split of a data set.

    Args:
        source: `sentiment` or `newsgroups`; a .csv or .jsonl file, all of which is training data; or a folder
            with train.csv and test.csv (or .jsonl). Files have the columns text, label and, optionally, group;
            other columns are ignored. Write ./sentiment for a folder of that name.
        labels: The label names. A row's label is one of them, or its index when no label has that name.
        split: Which part to read.

    Raises:
        DataError: The source is missing, cannot be fetched, is empty, or has a malformed row; the message
            says which line, what was found and what to do.
    """
    records = PACKAGED[source](split) if source in PACKAGED else _file_records(_split_file(source, split))
    return _rows(records, labels, source)


def _rows(records: Iterable[_Record], labels: tuple[str, ...], source: str) -> Rows:
    index = {str(i): i for i in range(len(labels))} | {name: i for i, name in enumerate(labels)}
    texts: list[str] = []
    groups: list[str] = []
    targets: list[int] = []
    for record in records:
        if not record.text.strip():
            raise DataError(f"{record.where}: the text is empty; fill it in or remove the row")
        if any("\ud800" <= character <= "\udfff" for character in record.text):
            raise DataError(f"{record.where}: the text has half of a surrogate pair; write the file as valid Unicode")
        if record.label not in index:
            raise DataError(
                f"{record.where}: label {record.label!r} is not allowed; use {_some(labels)} or an index from 0 to "
                f"{len(labels) - 1}, or correct model.labels"
            )
        texts.append(record.text)
        groups.append(record.group)
        targets.append(index[record.label])
    if not texts:
        raise DataError(f"{source} has no rows; at least one labelled text is needed")
    return Rows(tuple(texts), np.array(targets, np.int64), tuple(groups), labels)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} ... ({len(names)} in all)"


def _split_file(source: str, split: Split) -> Path:
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in _READERS if (path / f"{split}{suffix}").is_file()]
        if len(found) == 1:
            return found[0]
        names = f"both {split}.csv and {split}.jsonl" if found else f"neither {split}.csv nor {split}.jsonl"
        raise DataError(f"folder {source} has {names}; exactly one of them is needed")
    if not path.is_file():
        near = difflib.get_close_matches(source, PACKAGED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"name a file, a folder or one of {', '.join(PACKAGED)}"
        raise DataError(f"data source {source!r} does not exist; {hint}")
    if path.suffix not in _READERS:
        raise DataError(f"data file {source} ends in {path.suffix!r}; .csv or .jsonl is needed")
    if split == "test":
        raise DataError(f"{source} is one file, all of it training data; give a folder with train and test files")
    return path


def _file_records(path: Path) -> Iterator[_Record]:
    try:
        yield from _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 (it has a byte 0x{byte:02x} out of place); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error


def _csv_records(path: Path) -> Iterator[_Record]:
    # utf-8-sig: spreadsheets put a byte-order mark in front, which would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            columns = reader.fieldnames or ()
            missing = [name for name in ("text", "label") if name not in columns]
            if missing:
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or '(none)'} but not {' and '.join(missing)}; "
                    "its first line must name text, label and, optionally, group"
                )
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if row["text"] is None or row["label"] is None or None in row:
                    raise DataError(f"{where}: {len(columns)} fields are needed, as in the first line; quote commas")
                yield _Record(where, row["text"], row["label"].strip(), (row.get("group") or "").strip())
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not valid CSV: {error}; correct it") from error


def _jsonl_records(path: Path) -> Iterator[_Record]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON: {error}; write one object on each line") from error
            yield _json_record(row, where)


def _json_record(row: object, where: str) -> _Record:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object; write {{'text': ..., 'label': ...}} in JSON")
    for name in ("text", "label"):
        if name not in row:
            raise DataError(f"{where} has no {name!r}; text and label are needed, group is optional")
    text, label, group = row["text"], row["label"], row.get("group")
    if not isinstance(text, str) or not isinstance(group, str | None):
        raise DataError(f"{where}: text and group must be strings; found {text!r:.60} and {group!r:.60}")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(f"{where}: label {label!r:.60} must be a label name or its index")
    return _Record(where, text, str(label), group or "")


_READERS: dict[str, Callable[[Path], Iterator[_Record]]] = {".csv": _csv_records, ".jsonl": _jsonl_records}

_DOMAINS = {
    "movie": ("movieReviewSnippets_GroundTruth.txt", False),
    "tweets": ("tweets_GroundTruth.txt", False),
    "amazon": ("amazonReviewSnippets_GroundTruth.txt", True),
    "nyt": ("nytEditorialSnippets_GroundTruth.txt", True),
}
"""File of each domain, and whether its ids are ARTICLE_SENTENCE."""


def _sentiment(split: Split) -> Iterator[_Record]:
    """Sentences of four domains; the label is the sign of the mean human rating, and a mean of zero is left out.

    Source: Hutto & Gilbert, VADER, ICWSM 2014 (20 raters a sentence, scale -4 to 4).
    """
    folder = fetch("sentiment")
    for domain, (file, articles) in _DOMAINS.items():
        sentences = list(_domain(folder / file, domain, articles))
        held_out = _held_out(sentences)
        for sentence in sentences:
            if (sentence.unit in held_out) == (split == "test"):
                yield sentence.record


def _domain(path: Path, domain: str, articles: bool) -> Iterator[_Sentence]:
    for number, line in enumerate(_lines(path), 1):
        if not line:
            continue
        name, rating, text = _fields(line, 3, f"{path} line {number}")
        try:
            score = float(rating)
        except ValueError:
            raise DataError(f"{path} line {number}: rating {rating!r} is not a number; fetch the asset again") from None
        if score:
            label = "positive" if score > 0 else "negative"
            # A model that has seen an article or an equal text would look better on the rest than it is.
            unit = name.partition("_")[0] if articles else text
            yield _Sentence(_Record(f"{path} line {number}", text, label, domain), unit)


def _held_out(sentences: list[_Sentence]) -> set[str]:
    """Units that make up 15% of the sentences, the same on every machine, stratified by each unit's majority label."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in sentences:
        counts[sentence.unit][sentence.record.label] += 1
    strata: dict[str, list[str]] = defaultdict(list)
    for unit in sorted(counts, key=lambda unit: hashlib.sha256(unit.encode()).digest()):
        strata[max(sorted(counts[unit]), key=counts[unit].__getitem__)].append(unit)
    chosen: set[str] = set()
    for units in strata.values():
        wanted = _HELD_OUT * sum(counts[unit].total() for unit in units)
        for unit in units:
            if wanted <= 0:
                break
            chosen.add(unit)
            wanted -= counts[unit].total()
    return chosen


def _newsgroups(split: Split) -> Iterator[_Record]:
    """Posts of 20 Newsgroups in the split by date that the data set is published with: lower case, letters only."""
    path = fetch("newsgroups") / f"20newsgroups-{split}.tab"
    # The first three lines name the columns and their types.
    for number, line in enumerate(_lines(path)[3:], 4):
        if line:
            label, text = _fields(line, 2, f"{path} line {number}")
            yield _Record(f"{path} line {number}", text, label, "")


def _lines(path: Path) -> list[str]:
    """Lines without their ends; `str.splitlines` would also split at separators within a text."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete its folder to fetch the asset again") from error


def _fields(line: str, count: int, where: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != count:
        raise DataError(f"{where} has {len(fields)} fields instead of {count}; delete its folder to fetch it again")
    return fields


PACKAGED: dict[str, Callable[[Split], Iterator[_Record]]] = {"sentiment": _sentiment, "newsgroups": _newsgroups}
"""Data sets that come as packages, by name."""
