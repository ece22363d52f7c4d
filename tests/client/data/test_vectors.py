"""A teacher's vectors: lists in JSON and Parquet, texts in tables, and what is no vector."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import parquet

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import digest
from fedloom.client.data.survey import guess_task
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError

TASK = "embedding-regression"
ROWS: list[dict[str, Any]] = [
    {"text": "good film", "vector": [0.1, -2, 3e-5]},
    {"text": "bad, plot", "vector": [1.5, 0.0, -0.25]},
]


def test_vectors_are_the_same_rows_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    quoted = [f'"{row["text"]}","{json.dumps(row["vector"])}"' for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(["text,vector", *quoted]) + "\n")
    (tmp_path / "a.tsv").write_text(
        "\n".join(["text\tvector", *(f"{row['text']}\t{json.dumps(row['vector'])}" for row in ROWS)]) + "\n"
    )
    narrow = arrow.array([row["vector"] for row in ROWS], arrow.list_(arrow.float32(), 3))
    parquet.write_table(arrow.table({"text": [row["text"] for row in ROWS], "vector": narrow}), tmp_path / "a.parquet")

    sources = [str(tmp_path / f"a.{kind}") for kind in ("jsonl", "csv", "tsv", "parquet")]
    found = [load_rows(source, (), "train", TASK) for source in sources]

    wanted = np.array([row["vector"] for row in ROWS], np.float32)
    for rows in found:
        np.testing.assert_array_equal(rows.labels, wanted)
        assert rows.labels.dtype == np.float32
        assert rows.texts == ("good film", "bad, plot")
    assert {guess_task(source, Form()) for source in sources} == {TASK}
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": row["text"], "label": "a"}) + "\n" for row in ROWS))
    same = load_rows(str(plain), ("a", "b"), "train", "text-classification")
    assert digest(same) == digest(found[0]), "the account knows a text, whatever is learned of it"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        3.5,
        "0.1 0.2",
        "[0.1, NaN]",
        "[" * 100_000,
        [0.1, None],
        [0.1, True],
        [0.1, "0.2"],
        [[0.1, 0.2]],
        [float("inf")],
        [1e39],
        [10**400],
        {"0": 1.0},
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_vector_is_refused_without_quoting_it(value: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the ward", "vector": value}) + "\n")

    with pytest.raises(DataError, match="line 1: vector must be a list of finite numbers") as raised:
        load_rows(str(tmp_path / "a.jsonl"), (), "train", TASK)

    assert "0.1 0" not in str(raised.value)
    assert "the ward" not in str(raised.value)
