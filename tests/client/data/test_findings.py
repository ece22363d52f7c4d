"""Made-up notes: the same on every machine, nothing of the held-out ones in the others, and labels that words alone do
not tell."""

import hashlib
import re
from collections import Counter, defaultdict

import pytest

from fedloom.client.data.load import load_rows
from fedloom.client.data.packaged.findings import Findings, findings_of
from fedloom.client.data.packaged.findings_words import FINDINGS, STYLES
from fedloom.client.data.records import Record

LABELS = ("present", "absent", "possible", "past", "family")


@pytest.fixture(scope="module")
def train() -> list[Record]:
    return list(Findings().records("train"))


@pytest.fixture(scope="module")
def test() -> list[Record]:
    return list(Findings().records("test"))


def spans(record: Record) -> list[tuple[str, str]]:
    """The findings of a note with their labels; commas and joining words stand between two."""
    found: list[list[str]] = []
    last = ""
    for word, tag in zip(record.words, record.tags, strict=True):
        if tag:
            if tag == last:
                found[-1][0] += f" {word}"
            else:
                found.append([word, tag])
        last = "" if word[-1] in ",;." else tag
    return [(text.rstrip(",;.").lower(), tag) for text, tag in found]


def test_they_are_the_same_everywhere(train: list[Record], test: list[Record]) -> None:
    told = hashlib.sha256()
    for record in train + test:
        told.update(f"{record.group} {record.words} {record.tags}\n".encode())

    assert told.hexdigest() == "8d68ed9e8b7a40410a24fbf51076a42d6c1a0948244c1acd9b2fe73059fd824a"
    assert list(Findings().records("test")) == test


def test_there_are_as_many_of_each_department(train: list[Record], test: list[Record]) -> None:
    assert Counter(record.group for record in train) == dict.fromkeys(STYLES, 10_000)
    assert Counter(record.group for record in test) == dict.fromkeys(STYLES, 500)


def test_no_finding_is_on_both_sides(train: list[Record], test: list[Record]) -> None:
    trained, held_out = (Counter(text for record in split for text, _ in spans(record)) for split in (train, test))

    assert trained.keys() == set(findings_of("train"))
    assert held_out.keys() == set(findings_of("test"))
    assert not trained.keys() & held_out.keys()
    assert sorted([*trained, *held_out]) == sorted(FINDINGS)


def test_no_two_notes_are_alike(train: list[Record], test: list[Record]) -> None:
    known = {re.sub(r"\W+", " ", record.text.lower()) for record in train + test}

    assert len(known) == len(train) + len(test), "a row that is there twice is protected once"


def test_every_finding_has_every_label_so_that_the_word_does_not_tell(train: list[Record]) -> None:
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for record in train:
        for text, tag in spans(record):
            labels[text].add(tag)

    assert all(each == set(LABELS) for each in labels.values())


def test_the_words_before_a_finding_can_mislead(train: list[Record]) -> None:
    after: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        for cue in ("no", "no change in", "not only"):
            if match := re.search(rf"(?:^|[.;,] ){cue} (\w+)", record.text.lower()):
                before = record.text[: match.start(1)].split()
                after[cue][record.tags[len(before)]] += 1

    assert after["no"]["absent"] > 0 < after["no"][""], "as in: no new fever"
    assert after["no"].keys() <= {"absent", ""}
    assert set(after["no change in"]) == set(after["not only"]) == {"present"}


def test_departments_write_differently(train: list[Record]) -> None:
    by = {name: {word for record in train if record.group == name for word in record.words} for name in STYLES}

    own = {
        name: words.difference(*(other for place, other in by.items() if place != name)) for name, words in by.items()
    }
    assert {"pt", "c/o"} <= own["emergency"]
    assert all(len(words) >= 10 for words in own.values())


def test_a_run_reads_them() -> None:
    rows = load_rows("findings", LABELS, "test", "token-classification")

    assert len(rows) == 2000
    assert set(rows.groups) == set(STYLES)
