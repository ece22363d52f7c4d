"""Labels in data: all of them names or all of them positions, by what fits, and an error where both do."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.client.data.load import load_rows
from fedloom.client.doctor.data_report import check
from fedloom.client.policy import Policy
from fedloom.core.config.file_format import Form, LabelsAs
from fedloom.core.errors import DataError

STARS = ("1", "2", "3", "4", "5")


def write(path: Path, labels: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": f"note {at}", "label": each}) + "\n" for at, each in enumerate(labels)))
    return str(path)


READINGS: list[tuple[tuple[str, ...], list[Any], LabelsAs | None, list[int]]] = [
    (STARS, ["1", "5", "2", "3"], None, [0, 4, 1, 2]),
    # The labels of a site that counts from 0: none of them may be taken for a name, not even those that are one.
    (STARS, ["0", "1", "2", "3", "4"], None, [0, 1, 2, 3, 4]),
    (STARS, [0, 4, 3], None, [0, 4, 3]),
    (STARS, ["1", "2"], "names", [0, 1]),
    (STARS, ["1", "2"], "positions", [1, 2]),
    (("0", "1"), ["1", "0"], None, [1, 0]),
    (("1", "0"), ["1", "0"], "names", [0, 1]),
    # pandas turns whole numbers into these once a value of their column is missing.
    (("bad", "good"), [1.0, 0.0], None, [1, 0]),
    (("bad", "good"), ["1.0", "0.0"], None, [1, 0]),
    (STARS, [5.0, "1"], None, [4, 0]),
    (("1.0", "2.0"), [1.0, 2.0], None, [0, 1]),
]


@pytest.mark.parametrize(("names", "labels", "asked", "classes"), READINGS)
def test_all_labels_of_a_file_are_read_in_one_way(
    names: tuple[str, ...], labels: list[Any], asked: LabelsAs | None, classes: list[int], tmp_path: Path
) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", labels), names, "train", form=Form(labels_as=asked))

    assert rows.labels.tolist() == classes


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (STARS, ["1", "2", "3", "4"], "1 is the label '1' as a name and '2' as a position; add labels_as"),
        (("1", "0"), ["1", "0"], "1 is the label '1' as a name and '0' as a position"),
        (
            ("bad", "good"),
            ["good", "0"],
            "line 2: a label is not among those expected; use 'bad', 'good', or throughout",
        ),
        (STARS, ["0", "5"], "line 1: a label is not among those expected"),
        (("bad", "good"), ["good", ""], "line 2: a label is empty; fill it in"),
        (("bad", "good"), ["good", " "], "line 2: a label is empty"),
        (("bad", "good"), ["good", None], "line 2: a label is empty"),
        (("bad", "good"), ["good", float("nan")], "line 2: a label is empty"),
        (("bad", "good"), ["good", 0.5], "line 2: a label must be a label's name or its index"),
        (("bad", "good"), ["good", "\ud800"], "line 2: a label has half of a surrogate pair"),
    ],
)
def test_labels_that_fit_in_no_way_or_in_both_are_refused(
    names: tuple[str, ...], labels: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "a.jsonl", labels), names, "train")


def test_tags_are_read_in_one_way_over_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"tokens": ["a", "b"], "tags": ["1", "2"]}, {"tokens": ["c"], "tags": ["0"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = load_rows(str(path), ("1", "2", "3"), "train", "token-classification")

    assert [tags.tolist() for tags in found.tags] == [[1, 2], [0]]


def of(policy: Policy, source: str, labels: tuple[str, ...]) -> Policy:
    return policy.model_copy(update={"data": policy.data.model_copy(update={"source": source, "labels": labels})})


def test_a_check_says_how_labels_are_read_and_what_can_be_read_in_two_ways(policy: Policy, tmp_path: Path) -> None:
    positions = check(of(policy, write(tmp_path / "a.jsonl", ["0", "1", "1"]), STARS), None)
    both = check(of(policy, write(tmp_path / "b.jsonl", ["1", "2"]), STARS), None)
    empty = check(of(policy, write(tmp_path / "c.jsonl", ["1", "5", ""]), STARS), None)

    assert ("note", "labels are read as positions, 0 is '1'") in positions.findings
    assert positions.survey.labels == {"1": 1, "2": 2}
    assert positions.document()["labels_as"] == "positions"
    assert not both.sound
    assert any(level == "error" and "as a name and '2' as a position" in text for level, text in both.findings)
    assert not both.survey.usable
    assert (empty.sound, len(empty.survey.usable), empty.survey.rows) == (False, 2, 3)
    assert ("note", "labels are read as names") in empty.findings


def test_a_group_may_be_a_number_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    groups: list[Any] = [7, 7.0, "north", None, float("nan"), True]
    rows = [{"text": f"note {at}", "label": "bad", "group": each} for at, each in enumerate(groups)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert load_rows(str(path), ("bad", "good"), "train").groups == ("7", "7", "north", "", "", "True")

    path.write_text(json.dumps({"text": "a", "label": "bad", "group": ["x"]}))
    with pytest.raises(DataError, match=r"line 1: group must be a string or a number; .*name another in data\.columns"):
        load_rows(str(path), ("bad", "good"), "train")
    assert load_rows(str(path), ("bad", "good"), "train", form=Form(columns={"group": "none"})).groups == ("",)
