"""Spoken keywords: the same each time, new voices and new other words in what is held out."""

import hashlib
import io
import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fedloom.client.data.load import load_rows
from fedloom.client.data.packaged.api import DataSource, Split
from fedloom.client.data.packaged.spoken import keywords
from fedloom.client.data.packaged.spoken.keywords import Keywords
from fedloom.client.data.packaged.spoken.rooms import RATE, Wave
from fedloom.client.data.packaged.spoken.voices import Speaker
from fedloom.client.data.records import Record
from fedloom.conformance.data import DataConformance
from fedloom.core.config.run import load_run

EXAMPLE = Path(__file__).parents[3] / "examples" / "keywords.toml"
COUNTS = {"train": 500, "test": 100}
HALLS = ("assembly", "packing", "paintshop", "foundry")


@cache
def rows(split: Split) -> tuple[Record, ...]:
    return tuple(Keywords().records(split))


class TestKeywords(DataConformance):
    def source(self) -> DataSource:
        return Keywords()

    def rows(self, split: Split) -> list[Record]:
        return list(rows(split))


def test_they_are_the_same_each_time() -> None:
    told = hashlib.sha256()
    for record in rows("train") + rows("test"):
        told.update(f"{record.group} {record.label}\n".encode())
        told.update(record.audio)

    assert told.hexdigest()[:16] == "1ddc6c4c434d3800"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_hall_has_its_recordings_of_at_most_a_second(split: Split) -> None:
    assert Counter(record.group for record in rows(split)) == dict.fromkeys(HALLS, COUNTS[split])
    for record in rows(split):
        found = soundfile.info(io.BytesIO(record.audio))
        assert (found.samplerate, found.channels, found.subtype) == (RATE, 1, "PCM_16")
        assert 0.3 < found.duration <= 1
    assert len({record.audio for record in rows(split)}) == len(rows(split))
    labels = Counter(record.label for record in rows(split))
    assert labels["other"] == pytest.approx(0.2 * len(rows(split)), rel=0.25)
    assert min(labels.values()) > 0.05 * len(rows(split))


def test_voices_and_other_words_that_are_held_out_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[tuple[Speaker, str]]] = []

    def beeps(said: list[tuple[Speaker, str]], draw: random.Random) -> list[Wave]:
        heard.append(said)
        return [np.sin(np.arange(RATE // 2)) for _ in said]

    monkeypatch.setattr(keywords, "spoken", beeps)
    made = {split: list(Keywords().records(split)) for split in ("train", "test")}
    commands = {record.label for record in made["train"]} - {"other"}

    trained, tested = ({word for each in part for _, word in each} for part in (heard[:4], heard[4:]))
    assert trained & tested == commands
    assert len(tested - commands) >= 15
    for train, test in zip(heard[:4], heard[4:], strict=True):
        known = {who for who, _ in train}
        assert sum(who not in known for who, _ in test) == 50
        assert len({who for who, _ in test} - known) == 1


def test_the_run_file_reads_them() -> None:
    config = load_run(EXAMPLE)

    read = load_rows("keywords", config.model.labels, "test", config.model.task)

    assert len(read) == 4 * COUNTS["test"]
    assert set(read.groups) == set(HALLS)
    assert set(read.labels.tolist()) == set(range(9))
    assert config.model.audio_seconds == 1
    assert config.privacy.delta < 1 / COUNTS["train"]
