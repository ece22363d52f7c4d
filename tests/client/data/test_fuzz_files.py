"""Data files, pictures, run files and policies as they may come, sound and damaged: never a traceback, no silent loss.

`FEDLOOM_PROVE=1` tries a hundred times as many.
"""

import csv
import io
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import tomli_w
from PIL import Image
from pyarrow import parquet

from fedloom.client.data.load import load_rows
from fedloom.client.data.media.images import decode
from fedloom.client.data.survey import Survey, survey
from fedloom.client.policy import Policy, load_policy
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError, DataError
from tests.proto.fuzzing import POLICY, RUN
from tests.proto.mutating import bent, garbled

CASES = 5_000 if os.environ.get("FEDLOOM_PROVE") == "1" else 50
LABELS = ("0", "1", "bad")
PIECES = (
    *(
        "good",
        "film",
        " ",
        "  ",
        '"',
        '""',
        "'",
        ",",
        "\t",
        ";",
        "\\",
        "\n",
        "\r\n",
        "é",
        "\u2028",
        "\ufeff",
        "#",
        "=1",
    ),
    *("label", "0", "1.0", "bad", "\0", "{", "}", "[", "<s>", "\x0b", "\x85", "a,b", '",'),
)


def text(rng: random.Random, without: str = "") -> str:
    pieces = [piece for piece in PIECES if not set(piece) & set(without)]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 6)))


def surveyed(path: Path, task: str = "text-classification") -> Survey | None:
    """What a check finds; None if the file cannot be read at all. Training must agree with it."""
    try:
        found = survey(str(path), LABELS, task, Form())
    except DataError:
        found = None
    try:
        rows = load_rows(str(path), LABELS, "train", task)
    except DataError:
        assert found is None or not found.rows or found.unreadable or found.unknown
    else:
        assert found is not None
        assert len(rows) == found.rows == len(found.usable)
    return found


def written(kind: str, rows: list[tuple[str, str]], rng: random.Random) -> bytes:
    """The rows in a format, as one of the programs that write it would."""
    out = io.StringIO(newline="")
    if kind == "jsonl":
        ascii_only = rng.random() < 0.5
        for each, label in rows:
            out.write(json.dumps({"text": each, "label": label}, ensure_ascii=ascii_only) + "\n")
    else:
        end = rng.choice(("\n", "\r\n"))
        dialect = "unix" if rng.random() < 0.5 else "excel"  # with quotation marks always, or where they are needed
        writer = csv.writer(out, dialect, delimiter="\t" if kind == "tsv" else ",", lineterminator=end)
        writer.writerows([("text", "label"), *rows])
    return out.getvalue().encode(rng.choice(("utf-8", "utf-8-sig")))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_what_a_sound_file_says_is_read_as_it_is_or_refused_by_its_line(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    path = tmp_path / f"a.{kind}"
    for _ in range(CASES):
        # A text with a tab and a line break in a .tsv file may be two rows as well; texts have no tabs there.
        texts = [text(rng, "\t" if kind == "tsv" else "") for _ in range(rng.randint(1, 6))]
        rows = [(each, rng.choice(("0", "bad", "0", "bad", "", "x"))) for each in texts]
        path.write_bytes(written(kind, rows, rng))

        found = surveyed(path)

        assert found is not None
        assert found.rows == len(rows)
        wanted = [each for each, label in rows if each.strip() and label in LABELS]
        assert [record.text for record in found.usable] == wanted
        broken = sum(tally.count for tally in found.unreadable.values())
        assert broken + found.unknown.total() + len(wanted) == len(rows)


@pytest.mark.parametrize("bare", [True, False])
def test_a_tsv_of_a_program_that_quotes_nothing_keeps_its_rows(bare: bool, tmp_path: Path) -> None:
    """Whatever quotation marks its texts hold; `bare` has one that is open in each file."""
    rng = random.Random(bare)
    path = tmp_path / "a.tsv"
    for _ in range(CASES):
        texts = [text(rng, "\t\n\r") + "." for _ in range(rng.randint(1, 6))]
        texts += ['"never closed'] * bare
        path.write_text("".join(f"{each}\t0\n" for each in ("text", *texts)).replace("text\t0", "text\tlabel", 1))

        found = surveyed(path)

        assert found is not None
        assert found.rows == len(texts)
        if bare:
            assert [record.text for record in found.usable] == texts


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_every_line_of_a_damaged_file_is_accounted_for(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    path = tmp_path / f"a.{kind}"
    for _ in range(2 * CASES):
        rows = [(text(rng), rng.choice(("0", "bad"))) for _ in range(rng.randint(1, 6))]
        path.write_bytes(garbled(written(kind, rows, rng), rng))

        found = surveyed(path)

        if found is None:
            continue
        with path.open(encoding="utf-8-sig", newline=None if kind == "jsonl" else "") as stream:
            lines = sum(1 for _ in stream) - (kind != "jsonl")
        notes = {note.what: tally.count for note, tally in found.notes.items()}
        empty = notes.pop("an empty line, passed over", 0)
        several = any("of several lines" in what for what in notes)
        if several or _header_lines(path, kind) > 1:
            assert found.rows + empty < lines + 1
        else:
            assert found.rows + empty == lines


def _header_lines(path: Path, kind: str) -> int:
    if kind == "jsonl":
        return 0
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if kind == "tsv" else ",")
        next(reader, None)
        return reader.line_num


def test_objects_of_any_shape_are_rows_or_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shapes: dict[str, dict[str, Any]] = {
        "text-classification": {"text": "a", "label": "0", "group": "g"},
        "token-classification": {"tokens": ["a", "b"], "tags": ["0", "bad"]},
        "causal-lm": {"prompt": "a", "completion": "b"},
        "instruct": {"messages": turns},
        "image-classification": {"image": "a.png", "label": "0"},
        "audio-classification": {"audio": "a.wav", "label": "0"},
        "embedding-regression": {"text": "a", "vector": [0.5, -1]},
    }
    for _ in range(CASES):
        task = rng.choice(list(shapes))
        rows = [bent(shapes[task], rng) if rng.random() < 0.7 else shapes[task] for _ in range(3)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        labels = () if task in ("causal-lm", "instruct", "embedding-regression") else LABELS

        found = survey(str(path), labels, task, Form())

        assert found.rows == 3
        refused = sum(tally.count for tally in found.unreadable.values())
        assert refused >= 3 - len(found.usable) - found.unknown.total()


def test_damaged_parquet_files_lose_no_row(tmp_path: Path) -> None:
    rng = random.Random(2)
    path = tmp_path / "a.parquet"
    table = arrow.table({"text": [f"note {at}" for at in range(50)], "label": ["0", "bad"] * 25, "group": [1.5] * 50})
    parquet.write_table(table, path, row_group_size=20)
    whole = path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(garbled(whole, rng))

        found = surveyed(path)

        if found is not None:
            with parquet.ParquetFile(path) as file:
                assert found.rows == file.metadata.num_rows == 50


def test_damaged_pictures_are_read_or_refused() -> None:
    rng = random.Random(3)
    pixels = np.random.default_rng(0).integers(65536, size=(9, 7), dtype=np.uint16)
    grey, deep = Image.fromarray((pixels >> 8).astype(np.uint8)), Image.fromarray(pixels)
    sound = []
    for picture, kind in (
        *((grey, kind) for kind in ("BMP", "JPEG", "PNG", "TIFF", "WEBP")),
        (deep, "PNG"),
        (deep, "TIFF"),
    ):
        out = io.BytesIO()
        picture.save(out, kind)
        sound.append(out.getvalue())
    for _ in range(2 * CASES):
        try:
            read = decode(garbled(rng.choice(sound), rng), "it")
        except DataError:
            continue
        assert read.mode == "RGB"


@pytest.mark.parametrize(("tables", "load"), [(RUN, load_run), (POLICY, load_policy)], ids=["run", "policy"])
def test_run_and_policy_files_of_any_editor_are_read_and_damaged_ones_refused(
    tables: dict[str, Any], load: Callable[[Path], RunConfig | Policy], tmp_path: Path
) -> None:
    rng = random.Random(4)
    path = tmp_path / "a.toml"
    sound = tomli_w.dumps(tables)
    path.write_text(sound)
    wanted = load(path)
    for mark in ("", "\ufeff"):
        for end in ("\n", "\r\n"):
            path.write_bytes((mark + sound.replace("\n", end)).encode())
            assert load(path) == wanted
    for _ in range(CASES):
        content = rng.choice((sound, sound.replace("\n", "\r\n"), "\ufeff" + sound)).encode(
            rng.choice(("utf-8", "utf-16"))
        )
        path.write_bytes(garbled(content, rng) if rng.random() < 0.9 else content)
        with suppress(ConfigError):
            load(path)
