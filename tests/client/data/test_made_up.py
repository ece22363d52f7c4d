"""Data sets of made-up rows: the same on every machine, nothing held out in the others, owners that differ."""

import hashlib
import io
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedloom.client.data.load import load_rows
from fedloom.client.data.packaged.api import DataSource, Split
from fedloom.client.data.packaged.complaints import Complaints
from fedloom.client.data.packaged.complaints_words import ISSUES, PRODUCTS
from fedloom.client.data.packaged.defects import Defects
from fedloom.client.data.packaged.made_up import distinct, side
from fedloom.client.data.packaged.preferences import Preferences
from fedloom.client.data.packaged.triage import Triage
from fedloom.client.data.packaged.triage_words import COMPLAINTS, FILLERS, LEVELS, SIGNS
from fedloom.client.data.records import Record
from fedloom.conformance.data import DataConformance
from fedloom.core.config.run import load_run

EXAMPLES = Path(__file__).parents[3] / "examples"
SOURCES: dict[str, DataSource] = {
    "triage": Triage(),
    "complaints": Complaints(),
    "preferences": Preferences(),
    "defects": Defects(),
}
GROUPS = {
    "triage": ("city", "county", "university", "coast"),
    "complaints": ("northern", "direct", "building", "cooperative"),
    "preferences": ("shop", "clinic"),
    "defects": ("casting", "brushing", "coating", "rolling"),
}
COUNTS = {"triage": (3000, 300), "complaints": (3000, 300), "preferences": (150, 40), "defects": (600, 100)}
"""Of each group, to train on and held out."""
DIGESTS = {
    "triage": "45c09b37355ecaf5",
    "complaints": "63409619e2d32b2d",
    "preferences": "4409648012d74049",
    "defects": "6f70ad96f289da1a",
}


@cache
def rows(name: str, split: Split) -> tuple[Record, ...]:
    return tuple(SOURCES[name].records(split))


class Battery(DataConformance):
    """The battery of each, over rows that were drawn once."""

    name: str

    def source(self) -> DataSource:
        return SOURCES[self.name]


class TestTriage(Battery):
    name = "triage"


class TestComplaints(Battery):
    name = "complaints"


class TestPreferences(Battery):
    name = "preferences"


class TestDefects(Battery):
    name = "defects"


@pytest.mark.parametrize("name", SOURCES)
def test_they_are_the_same_everywhere(name: str) -> None:
    told = hashlib.sha256()
    for record in rows(name, "train") + rows(name, "test"):
        told.update(f"{record.group} {record.text} {record.label} {record.tags} {record.parts}\n".encode())
        told.update(record.image)

    assert told.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", SOURCES)
def test_there_are_as_many_of_each_group(name: str) -> None:
    for split, count in zip(("train", "test"), COUNTS[name], strict=True):
        assert Counter(record.group for record in rows(name, split)) == dict.fromkeys(GROUPS[name], count)


@pytest.mark.parametrize("name", SOURCES)
def test_no_two_rows_of_a_group_are_alike(name: str) -> None:
    """A row that is there twice is protected once."""
    every = rows(name, "train") + rows(name, "test")

    known = {(each.group, re.sub(r"\W+", " ", each.text.lower()), each.image) for each in every}

    assert len(known) == len(every)


@pytest.mark.parametrize("name", SOURCES)
def test_the_run_file_reads_them(name: str) -> None:
    config = load_run(EXAMPLES / f"{name}.toml")

    read = load_rows(name, config.model.labels, "test", config.model.task)

    assert SOURCES[name].task == config.model.task
    assert len(read) == COUNTS[name][1] * len(GROUPS[name])
    assert set(read.groups) == set(GROUPS[name])
    assert config.privacy.delta < 1 / COUNTS[name][0]


@pytest.mark.parametrize("name", ["triage", "complaints", "preferences"])
def test_owners_write_differently(name: str) -> None:
    by = {
        group: {word for each in rows(name, "train") if each.group == group for word in each.text.split()}
        for group in GROUPS[name]
    }

    for group, words in by.items():
        assert len(words.difference(*(other for where, other in by.items() if where != group))) >= 5


def complaint_of(record: Record) -> str:
    """What the first part of a triage note is about."""
    first = re.split(r"; | - |\. ", record.text.lower().replace("complaint: ", "").replace("transfer: ", ""))[0]
    return max((each for each in COMPLAINTS if re.search(rf"\b{re.escape(each.lower())}\b", first)), key=len)


def test_no_complaint_of_a_triage_note_is_on_both_sides() -> None:
    trained, tested = (set(map(complaint_of, rows("triage", split))) for split in ("train", "test"))

    assert trained == set(side(COMPLAINTS, "train"))
    assert tested == set(side(COMPLAINTS, "test"))


def test_every_triage_complaint_has_every_grade_so_that_it_does_not_tell() -> None:
    grades: defaultdict[str, set[str]] = defaultdict(set)
    for record in rows("triage", "train"):
        grades[complaint_of(record)].add(record.label)

    assert all(found == set(LEVELS) for found in grades.values())


def test_the_worst_sign_decides_the_grade() -> None:
    patterns = [
        [_pattern(sign) for signs in SIGNS.values() for sign in signs[grade] if sign not in ("alert",)]
        for grade in range(len(LEVELS))
    ]
    for record in rows("triage", "test"):
        worst = max(
            (grade for grade, known in enumerate(patterns) if any(each.search(record.text) for each in known)),
            default=0,
        )
        assert LEVELS[worst] == record.label, record.text


def _pattern(sign: str) -> re.Pattern[str]:
    """A sign as a whole part of a note, with any of what may fill its gaps."""
    parts = re.split(r"\{(\w+)\}", sign)
    made = "".join(f"(?:{'|'.join(FILLERS[part])})" if at % 2 else re.escape(part) for at, part in enumerate(parts))
    return re.compile(rf"(?:^|; | - |\. ){made}(?:$|; | - |\.)", re.IGNORECASE)


def test_a_complaint_has_the_tags_of_what_it_says_and_no_phrase_is_on_both_sides() -> None:
    seen: dict[str, set[str]] = {}
    phrases = {issue: [(phrase, _phrase(phrase)) for phrase in pool] for issue, pool in ISSUES.items()}
    for split in ("train", "test"):
        seen[split] = set()
        for record in rows("complaints", split)[::7]:
            tags = set()
            for issue, pool in phrases.items():
                for phrase, pattern in pool:
                    if match := pattern.search(record.text):
                        seen[split].add(phrase)
                        tags |= {issue, _product(match["product"])}
            assert tags == set(record.tags), record.text
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) + len(seen["test"]) == sum(map(len, ISSUES.values()))


def _phrase(phrase: str) -> re.Pattern[str]:
    names = "|".join(name for names in PRODUCTS.values() for name in sorted(names, key=len, reverse=True))
    parts = re.split(r"\{(\w+)\}", phrase)
    gaps = {"product": f"(?P<product>{names})"}
    made = "".join(gaps.get(part, "[^.]+?") if at % 2 else re.escape(part) for at, part in enumerate(parts))
    return re.compile(rf"(?:^|\. ){made}\.", re.IGNORECASE)


def _product(name: str) -> str:
    return next(tag for tag, names in PRODUCTS.items() if name.lower() in {each.lower() for each in names})


def test_both_answers_to_a_question_say_the_same_and_no_manner_is_on_both_sides() -> None:
    manners: defaultdict[str, set[str]] = defaultdict(set)
    for split in ("train", "test"):
        for record in rows("preferences", split):
            prompt, preferred, other = record.parts
            assert record.text == prompt + preferred + other
            assert re.fullmatch(r"Customer: .*[.?]\nDesk:", prompt)
            assert len(set(preferred.split()) & set(other.split())) >= 2
            assert max(map(len, (preferred, other))) < 110
            manners[split] |= {" ".join(answer.split()[:2]) for answer in (preferred, other)}

    assert len(manners["train"]) > len(manners["test"]) >= 4
    assert not manners["train"] & manners["test"]


def test_defects_show_and_their_plants_look_different() -> None:
    light: defaultdict[str, list[float]] = defaultdict(list)
    dark: defaultdict[str, list[float]] = defaultdict(list)
    for record in rows("defects", "train"):
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), np.float64) / 255
        assert pixels.shape == (56, 56)
        if record.label == "none":
            light[record.group].append(float(pixels.mean()))
        if record.group == "coating":
            dark[record.label].append(float(np.median(pixels) - pixels.min()))

    means = sorted(float(np.mean(each)) for each in light.values())
    assert min(np.diff(means)) > 0.03
    assert np.mean(dark["hole"]) > np.mean(dark["stain"]) > np.mean(dark["none"])
    assert {record.label for record in rows("defects", "train")} == {"none", "scratch", "hole", "stain"}


def test_each_plant_has_mostly_one_defect() -> None:
    most = {}
    for group in ("casting", "brushing", "coating"):
        found = Counter(each.label for each in rows("defects", "train") if each.group == group and each.label != "none")
        most[group] = found.most_common(1)[0][0]

    assert most == {"casting": "hole", "brushing": "scratch", "coating": "stain"}


def test_every_fourth_is_held_out() -> None:
    assert side("abcdefgh", "test") == ("d", "h")
    assert not set(side("abcdefgh", "train")) & set(side("abcdefgh", "test"))


def test_rows_that_differ_in_capitals_or_marks_alone_are_drawn_again() -> None:
    made = iter(["A note.", "a NOTE", "another", "a note!", "a third"])

    assert [each.text for each in distinct(lambda: Record("", next(made)), 3)] == ["A note.", "another", "a third"]
