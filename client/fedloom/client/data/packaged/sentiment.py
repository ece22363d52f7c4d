"""Rated sentences of four domains."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.packaged.api import Split, fields, lines
from fedloom.client.data.records import Record
from fedloom.core.errors import DataError

__all__ = ["Sentiment"]

_HELD_OUT = 0.15


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


@dataclass(frozen=True)
class Sentiment:
    """Sentences of four domains; the label is the sign of the mean human rating, and a mean of zero is left out.

    Source: Hutto & Gilbert, VADER, ICWSM 2014 (20 raters a sentence, scale -4 to 4).
    """

    task: ClassVar[str] = "text-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """Rows whose article, review or text is on that side of the split.

        Raises:
            DataError: See `fetch`.
        """
        folder = fetch("sentiment")
        for domain, (file, articles) in _DOMAINS.items():
            sentences = list(_domain(folder / file, domain, articles))
            held_out = _held_out(sentences)
            for sentence in sentences:
                if (sentence.unit in held_out) == (split == "test"):
                    yield sentence.record


def _domain(path: Path, domain: str, articles: bool) -> Iterator[_Sentence]:
    for number, line in enumerate(lines(path), 1):
        if not line:
            continue
        name, rating, text = fields(line, 3, f"{path} line {number}")
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
