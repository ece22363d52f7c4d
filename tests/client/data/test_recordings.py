"""Recordings with a class: in folders, tables and saved sets, what is said of other files, and their account."""

import io
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import soundfile
from pyarrow import parquet

from fedloom.client.data.load import load_rows
from fedloom.client.data.rows import digest
from fedloom.client.data.survey import guess_task
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError, LedgerError

TASK, LABELS = "audio-classification", ("cough", "speech")


def recording(number: int, form: str = "WAV") -> bytes:
    made = io.BytesIO()
    noise = np.random.default_rng(number).integers(-9000, 9000, 800).astype(np.int16)
    soundfile.write(made, noise, 8000, format=form)
    return made.getvalue()


def test_recordings_in_folders_tables_and_saved_sets_are_the_same_rows(tmp_path: Path) -> None:
    for number, label in enumerate(LABELS):
        (tmp_path / "folders" / "train" / label / "deep").mkdir(parents=True)
        (tmp_path / "folders" / "train" / label / "deep" / "a.WAV").write_bytes(recording(number))
        (tmp_path / f"{number}.flac").write_bytes(recording(number, "FLAC"))
    (tmp_path / "a.csv").write_text("audio,label\n0.flac,cough\n1.flac,speech\n")
    (tmp_path / "a.jsonl").write_text('{"audio": "0.flac", "label": "cough"}\n{"audio": "1.flac", "label": "speech"}\n')
    held = [{"audio": {"bytes": recording(number), "path": None}, "label": number} for number in (0, 1)]
    parquet.write_table(arrow.Table.from_pylist(held), tmp_path / "a.parquet")

    names = ("folders", "folders/train", "a.csv", "a.jsonl", "a.parquet")
    found = [load_rows(str(tmp_path / name), LABELS, "train", TASK) for name in names]

    assert [each.labels.tolist() for each in found] == [[0, 1]] * 5
    assert len({digest(each) for each in found}) == 1, "the account knows a recording by its samples"
    assert all(len(set(each.texts)) == 2 for each in found)
    assert {guess_task(str(tmp_path / name), Form()) for name in names} == {TASK}
    with pytest.raises(DataError, match="no folder test; recordings belong in test/CLASS"):
        load_rows(str(tmp_path / "folders"), LABELS, "test", TASK)


def test_every_file_of_a_folder_of_recordings_is_a_row_or_told_of(tmp_path: Path) -> None:
    for place in ("cough", "speech"):
        (tmp_path / place).mkdir()
    for number, form in enumerate(("WAV", "FLAC", "OGG", "MP3")):
        (tmp_path / "cough" / f"{number}.{form.lower()}").write_bytes(recording(number, form))
    (tmp_path / "speech" / "a.m4a").write_bytes(b"no recording that is read")
    (tmp_path / "stray.wav").write_bytes(recording(9))
    (tmp_path / "b.png").write_bytes(b"")
    told: list[str] = []

    rows = load_rows(str(tmp_path), LABELS, "train", TASK, tell=lambda _, line: told.append(line))

    assert len(rows) == 4
    said = "\n".join(told)
    assert "ends in .m4a, passed over: at" in said
    assert "if it is a recording, write it as one of WAV, FLAC, OGG, MP3" in said
    assert "a recording outside the folders of the classes: at" in said
    assert "a file beside the folders of the classes, passed over: at" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.wav", recording(1)[:30], "line 2 cannot be read as a recording"),
        ("a.aiff", recording(1, "AIFF"), "line 2 is a recording in AIFF; write it as one of WAV"),
        ("empty.wav", b"", "line 2: audio has no file"),
    ],
)
def test_a_recording_that_is_none_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.csv").write_text(f"audio,label\n{name},cough\n")

    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / "a.csv"), LABELS, "train", TASK)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cough").mkdir()

    with pytest.raises(DataError, match="has no recordings in a folder for each class, nor a train file"):
        load_rows(str(tmp_path), LABELS, "train", TASK)


def test_transcripts_are_not_looked_for_in_folders_of_classes(tmp_path: Path) -> None:
    (tmp_path / "cough").mkdir()
    (tmp_path / "cough" / "a.wav").write_bytes(recording(0))

    with pytest.raises(DataError, match=r"has none of train.csv"):
        load_rows(str(tmp_path), (), "train", "speech-recognition")


def test_other_recordings_of_one_length_belong_to_another_account(policy: Policy, tmp_path: Path) -> None:
    """Fingerprints differ in one word: taken for texts, they would be near-duplicates of each other."""
    for site, numbers in (("one", range(3)), ("two", range(10, 13)), ("three", range(12, 15))):
        (tmp_path / site / "cough").mkdir(parents=True)
        for number in numbers:
            (tmp_path / site / "cough" / f"{number}.wav").write_bytes(recording(number))
    rows = {site: load_rows(str(tmp_path / site), LABELS, "train", TASK) for site in ("one", "two", "three")}

    def opened(site: str) -> None:
        place = policy.client.model_copy(update={"state": tmp_path / f"state-{site}", "anchors": tmp_path / "anchors"})
        open_account(policy.model_copy(update={"client": place}), rows[site]).close()

    opened("one")
    opened("two")
    with pytest.raises(LedgerError, match="1 of 3 texts are charged to another account"):
        opened("three")
