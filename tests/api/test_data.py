"""Rows in memory are read, checked and accounted for as the rows of files are."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from PIL import Image

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import Rows, digest, documents
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import ModelSection
from fedloom.core.errors import DataError
from fedloom.simulation.in_memory import rows_of

LABELS = ("negative", "positive")
SECTION = ModelSection(base="x", labels=LABELS)


def saved(rows: list[dict[str, Any]], path: Path) -> str:
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def turned(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Classes by number, in another order than the run's."""
    names = ["positive", "negative"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list([row | {"label": names.index(row["label"])} for row in rows], features=features)


def by_position(rows: list[dict[str, Any]], number: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [row | {"label": number(LABELS.index(row["label"]))} for row in rows]


TABLES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "a list": lambda rows: rows,
    "a generator": lambda rows: iter(rows),
    "numpy's numbers": lambda rows: by_position(rows, np.int64),
    "torch's numbers": lambda rows: by_position(rows, torch.tensor),
    "a DataFrame": pandas.DataFrame,
    "a DataFrame of positions": lambda rows: pandas.DataFrame(by_position(rows, int)),
    "a DataFrame with an index": lambda rows: pandas.DataFrame(rows).set_index(pandas.Index(range(100, 140))),
    "an Arrow table": pyarrow.Table.from_pylist,
    "an Arrow batch": pyarrow.RecordBatch.from_pylist,
    "datasets": turned,
    "datasets for torch": lambda rows: turned(rows).with_format("torch"),
    "datasets, streamed": lambda rows: turned(rows).to_iterable_dataset(),
    "the Arrow table of datasets": lambda rows: turned(rows).with_format("arrow")[:],
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_is_read_as_the_file_with_the_same_rows(
    make: Callable[[list[dict[str, Any]]], object], suffix: str, listed: list[dict[str, Any]], tmp_path: Path
) -> None:
    theirs = load_rows(saved(listed, tmp_path / f"b{suffix}"), LABELS, "train")

    ours = rows_of(make(listed), "clinic-a", SECTION)

    assert ours.texts == theirs.texts
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert digest(ours) == digest(theirs), "one account, however the rows are brought"
    assert ours.place(6) == "clinic-a row 7"


def test_a_selection_of_a_data_set_is_read_in_its_order(listed: list[dict[str, Any]]) -> None:
    ours = rows_of(turned(listed).select([5, 0, 9]), "a", SECTION)

    assert ours.texts == tuple(listed[i]["text"] for i in (5, 0, 9))
    assert [LABELS[each] for each in ours.labels] == [listed[i]["label"] for i in (5, 0, 9)]


def test_words_turns_and_pictures_come_from_memory_too() -> None:
    words = [{"tokens": ["Ann", "runs"], "tags": ["B", "O"]}, {"tokens": ["so"], "tags": ["O"]}]
    tagged = ModelSection(base="x", task="token-classification", labels=("O", "B"))
    turns = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    chat = ModelSection(base="x", task="instruct", head="frozen")
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    seen = ModelSection(base="x", task="image-classification", labels=("a", "b"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    pictures = datasets.Dataset.from_list([{"image": Image.fromarray(pixels), "label": 0}], features=features)

    for table in (words, pandas.DataFrame(words), pyarrow.Table.from_pylist(words)):
        rows = rows_of(table, "a", tagged)
        assert rows.words == (("Ann", "runs"), ("so",))
        assert [each.tolist() for each in rows.tags] == [[1, 0], [0]]
    assert rows_of(datasets.Dataset.from_list(turns), "a", chat).turns == ((("user", "Hi"), ("assistant", "Ho")),)
    ours = rows_of(pictures, "a", seen)
    listed = rows_of([{"image": Image.fromarray(pixels), "label": "b"}], "a", seen)
    assert ours.labels.tolist() == listed.labels.tolist() == [1]
    assert digest(ours) == digest(listed)


def test_columns_are_mapped(rows: Rows) -> None:
    table = pandas.DataFrame([{"body": row["text"], "stars": row["label"], "id": 3} for row in documents(rows)])

    ours = rows_of(table, "a", SECTION, Form(columns={"text": "body", "label": "stars"}))

    assert digest(ours) == digest(rows)


GOOD = {"text": "a", "label": "negative"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([GOOD, {"text": "b"}], "clinic-a row 2 has no 'label'; text and label are needed"),
        ([GOOD, {"text": "b", "label": "poor"}], "clinic-a row 2: a label is not among those expected; use 'negative'"),
        ([GOOD, GOOD, {"text": " ", "label": "negative"}], "clinic-a row 3: the text is empty"),
        (pandas.DataFrame([GOOD, {"text": "b", "label": None}]), "clinic-a row 2: a label is empty"),
        (
            pandas.DataFrame([GOOD, {"text": pandas.NA, "label": 1}]),
            "clinic-a row 2: text must be a string",
        ),
        (pandas.DataFrame([{"body": "a", "label": 1}]), "clinic-a has the columns body, label but not text"),
        (pyarrow.table({"text": ["a"]}), "clinic-a has the columns text but not label"),
        ([GOOD, "b"], "clinic-a row 2 is a str; give a dict with text and label"),
        ([], "clinic-a has no rows; at least one is needed"),
        ({"text": ["a"], "label": [0]}, "clinic-a has a dict for its rows; give a list of dicts, or a table of pandas"),
        (7, "clinic-a has a int for its rows"),
        (
            [GOOD | {"prompt": "a", "completion": "b", "tokens": ["a"]}],
            "clinic-a row 1 has both text and prompt and tokens; keep one, so that the row has one privacy account",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_told_by_its_number(table: object, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        rows_of(table, "clinic-a", SECTION)


def test_a_column_that_is_there_twice_is_refused() -> None:
    table = pandas.DataFrame([["a", "b", "negative"]], columns=["text", "text", "label"])

    with pytest.raises(DataError, match="clinic-a has the column text 2 times; rename all but one"):
        rows_of(table, "clinic-a", SECTION)
