"""A client's own data in each format, with the file's own names of columns, and what is said of bad files."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import digest
from fedloom.core.config.file_format import Column, Form
from fedloom.core.errors import DataError

LABELS = ("negative", "positive")
SECRET = "Mrs Miller of Elm Street"

COLUMNS: dict[Column, str] = {"text": "note", "label": "stars", "group": "ward"}
TABLE: list[dict[str, Any]] = [
    {"id": 1, "note": "fine, really", "stars": "positive", "ward": "a"},
    {"id": 2, "note": "poor", "stars": "negative"},
]


def picture(shade: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(file, kind)
    return file.getvalue()


def saved(folder: Path, *tables: Any, state: dict[str, Any] | None = None) -> None:
    """What `Dataset.save_to_disk` leaves: Arrow streams and a state that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with arrow.OSFile(str(folder / name), "wb") as file, ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    content = {"_data_files": [{"filename": name} for name in names], "_split": "train", **(state or {})}
    (folder / "state.json").write_text(json.dumps(content))


def classes(table: Any, **columns: Any) -> Any:
    """The table with the metadata in which `datasets` keeps class names."""
    note = json.dumps({"info": {"features": columns}})
    return table.replace_schema_metadata({b"huggingface": note.encode()})


def write(folder: Path, kind: str) -> str:
    """`TABLE` in a format; returns the source."""
    path = folder / f"notes.{kind}"
    if kind in ("csv", "tsv"):
        quoted = [[f'"{row["note"]}"', row["stars"], str(row.get("ward", ""))] for row in TABLE]
        lines = [["note", "stars", "ward"], *quoted]
        path.write_text("\n".join(("\t" if kind == "tsv" else ",").join(line) for line in lines))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, TABLE)))
    elif kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(TABLE), path)
    else:
        table = arrow.Table.from_pylist(TABLE)
        saved(path, table.slice(0, 1), table.slice(1))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "saved"])
def test_every_format_gives_the_same_rows_under_the_owners_names(kind: str, tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, kind), LABELS, "train", form=Form(columns=COLUMNS))

    assert rows.texts == ("fine, really", "poor")
    assert rows.labels.tolist() == [1, 0]
    assert rows.groups == ("a", "")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "saved"])
def test_a_table_without_the_column_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path, kind)

    with pytest.raises(DataError, match=r"has the columns .*note, stars.* but not text and label; .*data\.columns"):
        load_rows(source, LABELS, "train")
    with pytest.raises(DataError, match="but not rating"):
        load_rows(source, LABELS, "train", form=Form(columns={**COLUMNS, "label": "rating"}))


def test_class_numbers_of_a_saved_data_set_count_in_its_own_order(tmp_path: Path) -> None:
    feature = {"names": ["positive", "negative"], "_type": "ClassLabel"}
    plain = arrow.table({"text": ["fine", "poor"], "label": [0, 1]})
    tagged = arrow.table({"tokens": [["fine", "day"]], "tags": [[0, 1]]})
    saved(tmp_path / "set" / "train", classes(plain, label=feature))
    (tmp_path / "tags").mkdir()
    parquet.write_table(
        classes(tagged, tags={"feature": feature, "_type": "List"}), tmp_path / "tags" / "train-00000-of-00001.parquet"
    )

    assert load_rows(str(tmp_path / "set"), LABELS, "train").labels.tolist() == [1, 0]
    (tags,) = load_rows(str(tmp_path / "tags"), LABELS, "train", "token-classification").tags
    assert tags.tolist() == [1, 0]


def test_splits_of_saved_data_sets_and_shards(tmp_path: Path) -> None:
    table = arrow.table({"text": ["fine"], "label": ["positive"]})
    saved(tmp_path / "dict" / "train", table)
    saved(tmp_path / "dict" / "test", table, table)
    saved(tmp_path / "one", table)
    for number in range(2):
        parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet")

    assert len(load_rows(str(tmp_path / "dict"), LABELS, "test")) == 2
    assert len(load_rows(str(tmp_path / "one"), LABELS, "train")) == 1
    assert len(load_rows(str(tmp_path), LABELS, "train")) == 2
    with pytest.raises(DataError, match="all of it training data; save a DatasetDict"):
        load_rows(str(tmp_path / "one"), LABELS, "test")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../other.arrow"}]}, "names no data file in that folder"),
        ({"_data_files": []}, "names no data file"),
        ({"_data_files": 3}, "is not what save_to_disk writes"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, r"call flatten_indices\(\)"),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "set", arrow.table({"text": ["a"], "label": ["negative"]}), state=state)

    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / "set"), LABELS, "train")


@pytest.mark.parametrize("name", ["a.parquet", "set/data-00000-of-00001.arrow"])
def test_a_damaged_table_is_refused_without_a_word_of_it(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "set", arrow.table({"text": ["a"], "label": ["negative"]}))
    (tmp_path / name).write_text(SECRET * 30)
    source = tmp_path / name if name.endswith("parquet") else tmp_path / "set"

    with pytest.raises(DataError, match=r"cannot be read as (Parquet|Arrow)") as found:
        load_rows(str(source), LABELS, "train")

    assert "Miller" not in str(found.value)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("text-classification", {"text": SECRET, "label": SECRET}),
    ("text-classification", {"text": [SECRET], "label": "negative"}),
    ("text-classification", {"text": SECRET, "label": [SECRET]}),
    ("text-classification", {"text": SECRET, "tokens": [SECRET], "label": "negative"}),
    ("text-classification", {"text": SECRET + "\ud800", "label": "negative"}),
    ("token-classification", {"tokens": [SECRET, ""], "tags": [SECRET]}),
    ("token-classification", {"tokens": [SECRET], "tags": [SECRET]}),
    ("token-classification", {"tokens": [SECRET], "tags": SECRET}),
    ("causal-lm", {"prompt": SECRET, "completion": ""}),
    ("instruct", {"messages": [{"role": "doctor", "content": SECRET}]}),
    ("instruct", {"messages": [{"role": "user", "content": SECRET}]}),
    ("instruct", {"messages": SECRET}),
    ("image-classification", {"image": SECRET, "label": "negative"}),
    ("audio-classification", {"audio": SECRET, "label": "negative"}),
]


@pytest.mark.parametrize(("task", "row"), BAD)
def test_no_error_quotes_a_row(task: str, row: dict[str, Any], tmp_path: Path) -> None:
    """It names the line and the remedy; what it found there may stand in a log."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")

    with pytest.raises(DataError, match="line 1") as found:
        load_rows(str(path), LABELS, "train", task)

    assert "Miller" not in str(found.value)


def test_naming_the_contents_column_hides_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "prompt": "b", "completion": "c", "label": "negative"}) + "\n")
    names: dict[Column, str] = {"text": "text"}

    assert load_rows(str(path), (), "train", "causal-lm", Form(columns=names)).texts == ("a",)
    assert load_rows(str(path), (), "train", "causal-lm", Form(columns={"completion": "completion"})).texts == ("bc",)
    with pytest.raises(DataError, match="both text and prompt; keep one, so that the row has one privacy account, or"):
        load_rows(str(path), (), "train", "causal-lm")
    with pytest.raises(DataError, match="has no 'messages'"):
        load_rows(str(path), (), "train", "instruct", Form(columns=names))


def test_conversations_are_read_and_a_prompt_is_one(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    turns.append({"role": "assistant", "content": "Hello"})
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"chat": turns}]), path)
    (tmp_path / "b.csv").write_text("prompt,completion\nQ ,A\n")

    rows = load_rows(str(path), (), "train", "instruct", Form(columns={"messages": "chat"}))
    pair = load_rows(str(tmp_path / "b.csv"), (), "train", "instruct")

    assert rows.turns == ((("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")),)
    assert pair.turns == ((("user", "Q "), ("assistant", "A")),)
    # The same people's words are the same texts of the privacy account under another task.
    assert digest(pair) == digest(load_rows(str(tmp_path / "b.csv"), (), "train", "causal-lm"))


def test_pictures_in_folders_tables_and_saved_sets_are_the_same_rows(tmp_path: Path) -> None:
    for number, label in enumerate(("negative", "positive")):
        (tmp_path / "folders" / "train" / label).mkdir(parents=True)
        (tmp_path / "folders" / "train" / label / "a.png").write_bytes(picture(number))
        (tmp_path / "folders" / "train" / label / "notes.txt").write_text("not a picture")
        (tmp_path / f"{number}.bmp").write_bytes(picture(number, "BMP"))
    (tmp_path / "a.csv").write_text("image,label\n0.bmp,negative\n1.bmp,positive\n")
    rows = [{"image": {"bytes": picture(shade), "path": None}, "label": shade} for shade in (0, 1)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    sources = [tmp_path / "folders", tmp_path / "folders" / "train", tmp_path / "a.csv", tmp_path / "a.parquet"]
    found = [load_rows(str(source), LABELS, "train", "image-classification") for source in sources]

    assert [each.labels.tolist() for each in found] == [[0, 1]] * 4
    assert len({digest(each) for each in found}) == 1, "the account knows a picture by its pixels"
    assert all(len(set(each.texts)) == 2 for each in found)
    with pytest.raises(DataError, match=r"no folder test; pictures belong in test/CLASS"):
        load_rows(str(sources[0]), LABELS, "test", "image-classification")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.png", "line 2 cannot be read as a picture"),
        ("gone.png", "line 2: its file cannot be read: No such file"),
        ("../a.png", "lies outside the table's folder"),
        ("a.eps", "cannot be read as a picture"),
    ],
)
def test_a_picture_that_is_none_is_refused(name: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "broken.png").write_bytes(picture(1)[:40])
    (folder / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "a.png").write_bytes(picture(1))
    (folder / "a.csv").write_text(f"image,label\n{name},negative\n")

    with pytest.raises(DataError, match=message):
        load_rows(str(folder / "a.csv"), LABELS, "train", "image-classification")


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "negative").mkdir()

    with pytest.raises(DataError, match="has no pictures in a folder for each class"):
        load_rows(str(tmp_path), LABELS, "train", "image-classification")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'fedloom\[arrow\]'"):
        load_rows(source, LABELS, "train", form=Form(columns=COLUMNS))
