"""Nothing in a source vanishes: every line and file is a row, is refused by name, or is told of."""

import io
import logging
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import ipc, parquet

from fedloom.client.data.load import load_rows
from fedloom.client.data.site_data import own_data
from fedloom.client.doctor.data_report import check
from fedloom.client.policy import Policy
from fedloom.core.errors import DataError

LABELS = ("negative", "positive")


def read(source: Path, task: str = "text-classification") -> tuple[tuple[str, ...], list[str], list[str]]:
    """The texts, what is told, and what of it is a warning; without the path."""
    told: list[tuple[int, str]] = []
    rows = load_rows(str(source), LABELS, "train", task, tell=lambda *line: told.append(line))
    lines = [(level, line.replace(f"{source}/", "").replace(str(source), "it")) for level, line in told]
    return (
        rows.texts,
        [line for level, line in lines if level == logging.INFO],
        [line for level, line in lines if level == logging.WARNING],
    )


def test_a_quotation_mark_in_a_tsv_glues_no_rows(tmp_path: Path) -> None:
    """Written by a program that quotes nothing: read as a quoted field, the second row ended in the third's text."""
    path = tmp_path / "a.tsv"
    path.write_text(
        'text\tlabel\n"Best film ever, she said\tpositive\na dull evening on a 24"\tnegative\nfine\tpositive\n'
    )

    texts, said, warned = read(path)

    assert texts == ('"Best film ever, she said', 'a dull evening on a 24"', "fine")
    assert said == [
        "it: 3 rows read; labels are read as names",
        "a file without quoted fields: quotation marks in it are part of the text: at it",
    ]
    assert not warned


def test_quoted_fields_of_a_tsv_are_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"a ""b"" c"\tpositive\n"two\nlines"\tnegative\n')

    texts, said, warned = read(path)

    assert texts == ('a "b" c', "two\nlines")
    assert said == ["it: 2 rows read; labels are read as names", "a row of several lines: at it line 3"]
    assert not warned


def test_rows_of_a_csv_that_may_be_glued_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"Best film,positive\na dull evening",negative\n\nfine,positive\n')

    texts, said, warned = read(path)

    assert texts == ("Best film,positive\na dull evening", "fine")
    assert said == ["it: 2 rows read; labels are read as names", "an empty line, passed over: at it line 4"]
    assert [line.partition(";")[0] for line in warned] == [
        "a row of several lines, each of which would be a row by itself: at it line 2"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,text\na,positive,b\n", "has the column text 2 times; rename all but one"),
        ("a.tsv", "text\tlabel\tlabel\na\tpositive\tb\n", "has the column label 2 times"),
        (
            "a.jsonl",
            '{"text": "a", "label": "positive", "text": "b"}\n',
            "line 1 has an object with the same name twice",
        ),
        ("a.csv", 'text,label\nfine,positive\n"never closed,positive\nmore,negative\n', "line 3: the row that begins"),
    ],
)
def test_what_would_win_in_silence_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name), LABELS, "train")


def test_a_repeated_column_of_a_parquet_file_is_refused_and_one_that_is_not_read_is_not(tmp_path: Path) -> None:
    columns = [arrow.array(["a"]), arrow.array(["positive"]), arrow.array(["b"])]
    parquet.write_table(arrow.table(columns, names=["text", "label", "text"]), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,label,id,id\na,positive,1,2\n")

    with pytest.raises(DataError, match="has the column text 2 times"):
        load_rows(str(tmp_path / "a.parquet"), LABELS, "train")
    assert load_rows(str(tmp_path / "b.csv"), LABELS, "train").texts == ("a",)


def test_files_beside_a_table_are_told_of(tmp_path: Path) -> None:
    for name in ("train.CSV", "test.csv", "train2.csv", ".train.csv.swp", "notes.txt"):
        (tmp_path / name).write_text("text,label\nfine,positive\n")

    texts, said, warned = read(tmp_path)

    assert texts == ("fine",)
    assert said[1:] == [
        "a hidden file or folder, passed over: at .train.csv.swp",
        "a file or folder beside the data, passed over: at notes.txt",
        "test data, not read here: at test.csv",
    ]
    assert warned == ["a table that is not called train: at train2.csv; add its rows to train, or move it away"]


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    table = arrow.table({"text": ["fine"], "label": ["positive"]})
    for number in (0, 2):
        parquet.write_table(table, tmp_path / f"train-0000{number}-of-00003.parquet")

    with pytest.raises(DataError, match="is one of 3 files and 2 are there; copy all of them"):
        load_rows(str(tmp_path), LABELS, "train")


def test_a_saved_set_that_was_cut_between_batches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data-00000-of-00001.arrow"
    table = arrow.table({"text": ["fine", "poor"], "label": ["positive", "negative"]})
    with arrow.OSFile(str(path), "wb") as file:
        stream = ipc.new_stream(file, table.schema)
        first = file.tell()
        stream.write_table(table, max_chunksize=1)
        stream.close()
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / "cache-1.arrow").write_bytes(path.read_bytes())
    whole = path.read_bytes()
    assert first < len(whole)

    texts, said, _ = read(tmp_path)
    assert texts == ("fine", "poor")
    assert said[1:] == ["an Arrow file that state.json does not name, passed over: at cache-1.arrow"]

    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="its end is missing"):
        load_rows(str(tmp_path), LABELS, "train")


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6), shade, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def test_every_file_of_a_folder_of_pictures_is_a_row_or_told_of(tmp_path: Path) -> None:
    for group in LABELS:
        (tmp_path / group / ".ipynb_checkpoints").mkdir(parents=True)
    names = ["a.JPG", "b.jfif", "deep/c.Jpeg", "d.gif", "e.HEIC", "f.HEIC", "._a.JPG", ".ipynb_checkpoints/a.jpg", "g"]
    for number, name in enumerate(names):
        path = tmp_path / "positive" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(20 * number))
    (tmp_path / "negative" / "linked").symlink_to(tmp_path / "positive")
    (tmp_path / "stray.png").write_bytes(picture(0))
    (tmp_path / "README.md").write_text("ours")

    texts, said, warned = read(tmp_path, "image-classification")

    assert len(texts) == 3
    assert said == [
        "it: 3 rows read; labels are read as names",
        "a file beside the folders of the classes, passed over: at README.md",
        "a hidden file or folder, passed over: 2 times, the first at positive/._a.JPG",
    ]
    assert [line.partition(";")[0] for line in warned] == [
        "a link to a folder, not followed: at negative/linked",
        "a file that ends in .gif, passed over: at positive/d.gif",
        "a file that ends in .HEIC, passed over: 2 times, the first at positive/e.HEIC",
        "a file whose name has no end, passed over: at positive/g",
        "a picture outside the folders of the classes: at stray.png",
    ]


def test_folders_beside_the_training_pictures_are_told_of(tmp_path: Path) -> None:
    for split in ("train", "test", "val"):
        (tmp_path / split / "positive").mkdir(parents=True)
        (tmp_path / split / "positive" / "a.jpg").write_bytes(picture(9))

    texts, said, _ = read(tmp_path, "image-classification")

    assert len(texts) == 1
    assert said[1:] == ["test data, not read here: at test", "a file or folder beside the data, passed over: at val"]


def test_a_check_and_the_start_of_a_run_tell_of_it(
    policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.csv").write_text("text,label\n\nfine,positive\npoor,negative\n")
    (tmp_path / "train-2.csv").write_text("text,label\nfine,positive\n")
    policy = policy.model_copy(update={"data": policy.data.model_copy(update={"source": str(tmp_path)})})

    report = check(policy, None)

    levels = {level: text for level, text in report.findings if "passed over" in text or "not called" in text}
    assert levels["note"].endswith("train.csv line 2")
    assert "train-2.csv; add its rows" in levels["warning"]
    assert report.sound

    with caplog.at_level(logging.INFO):
        own = own_data(policy)
    assert own is not None
    if own.ledger is not None:
        own.ledger.close()
    told = [record.getMessage() for record in caplog.records if record.name == "fedloom.client.data.site_data"]
    assert told[0].endswith("2 rows read; labels are read as names")
    assert {text.partition(":")[0] for text in told[1:]} == {
        "an empty line, passed over",
        "a table that is not called train",
    }
