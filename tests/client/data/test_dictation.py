"""Dictated orders: the same each time, nothing held out in the others, wards that differ, written as they are said."""

import hashlib
import io
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fedloom.client.assets.fetch import cache_dir
from fedloom.client.data.load import load_rows
from fedloom.client.data.packaged.api import DataSource, Split
from fedloom.client.data.packaged.spoken import dictation, orders
from fedloom.client.data.packaged.spoken.dictation import Dictation
from fedloom.client.data.packaged.spoken.orders import WARDS, order
from fedloom.client.data.packaged.spoken.rooms import NOISES, RATE, Wave, heard_in
from fedloom.client.data.packaged.spoken.voices import Speaker, spoken
from fedloom.client.data.records import Record
from fedloom.client.data.tokens import encode
from fedloom.conformance.data import DataConformance
from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError, DataError

EXAMPLE = Path(__file__).parents[3] / "examples" / "dictation.toml"
COUNTS = {"train": 800, "test": 60}
SOMEBODY = Speaker("en-us+m3", 170, 50)


@cache
def rows(split: Split) -> tuple[Record, ...]:
    return tuple(Dictation().records(split))


class TestDictation(DataConformance):
    def source(self) -> DataSource:
        return Dictation()

    def rows(self, split: Split) -> list[Record]:
        return list(rows(split))


def test_they_are_the_same_each_time() -> None:
    told = hashlib.sha256()
    for record in rows("train") + rows("test"):
        told.update(f"{record.group} {record.text} {record.parts}\n".encode())
        told.update(record.audio)

    assert told.hexdigest()[:16] == "60683b32bb7aec4c"
    assert tuple(Dictation().records("test")) == rows("test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_ward_has_its_recordings_of_at_most_five_seconds(split: Split) -> None:
    assert Counter(record.group for record in rows(split)) == dict.fromkeys(WARDS, COUNTS[split])
    for record in rows(split):
        found = soundfile.info(io.BytesIO(record.audio))
        assert (found.samplerate, found.channels, found.subtype) == (RATE, 1, "PCM_16")
        assert 0.5 < found.duration <= 5
    assert len({record.audio for record in rows(split)}) == len(rows(split))  # one that is there twice counts once


def what(written: str) -> str:
    """A drug with its dose, a flow with its device, and so on: what an order is about, however it is given."""
    return re.split(r" (?:PO|IV|SC|NEB) ", written)[0] if not re.search(r"mL per h", written) else written


def test_no_order_is_on_both_sides() -> None:
    trained, tested = ({what(record.text) for record in rows(split)} for split in ("train", "test"))

    assert len(tested) > 40
    assert not trained & tested


def test_a_guest_says_half_of_what_is_held_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[Speaker]] = []

    def beeps(said: list[tuple[Speaker, str]], draw: random.Random) -> list[Wave]:
        heard.append([who for who, _ in said])
        return [np.sin(np.arange(RATE)) for _ in said]

    monkeypatch.setattr(dictation, "spoken", beeps)
    for split in ("train", "test"):
        assert len(list(Dictation().records(split))) == COUNTS[split] * len(WARDS)

    for ward, trained, tested in zip(WARDS.values(), heard[:4], heard[4:], strict=True):
        assert set(trained) == set(ward.speakers)
        assert set(tested) == {*ward.speakers, ward.guest}
        assert 2 * tested[:60].count(ward.guest) == 60
    voices = [who.voice for ward in WARDS.values() for who in (*ward.speakers, ward.guest)]
    assert len(set(voices)) == len(voices)


@pytest.mark.parametrize("name", WARDS)
def test_what_is_said_is_what_is_written(name: str) -> None:
    ward, draw = WARDS[name], random.Random(5)
    for _ in range(300):
        said, written = order(ward, "train", draw)
        found = re.fullmatch(r"(.+) ([\d.]+) (mg|mcg|g|units) (PO|IV|SC|NEB) (\w+)( PRN)?", written)
        if found is None:
            continue
        drug, dose, unit, route, often, needed = found.groups()
        assert f"{drug} {dose} {orders._UNITS[unit].rstrip('s')}" in said
        for each in (route, often, "PRN") if needed else (route, often):
            ways = [*ward.says.get(each, ()), *orders._WORDS.get(each, ())]
            if each[1:-1].isdigit():
                ways = [f"every {each[1:-1]} hours"]
            assert any(way in said for way in ways), (said, written)


def test_wards_have_words_of_their_own() -> None:
    said = {}
    for name, ward in WARDS.items():
        draw = random.Random(0)
        said[name] = {word for _ in range(400) for word in order(ward, "train", draw)[0].split()}

    for name, words in said.items():
        assert len(words.difference(*(other for where, other in said.items() if where != name))) >= 2


@pytest.mark.parametrize("noise", NOISES)
def test_a_room_adds_as_much_noise_as_it_says(noise: str) -> None:
    voice = np.sin(np.arange(RATE) / 7) * np.linspace(0, 1, RATE)

    quiet, loud = (heard_in(voice, noise, level, np.random.default_rng(3)) for level in (0.0, 0.5))

    assert len(quiet) == len(loud) > len(voice) + RATE // 10
    alike = quiet @ loud / (quiet @ quiet)  # how loud the voice is in it
    rest = loud - alike * quiet
    assert 0.2 <= np.abs(loud).max() <= 0.5
    if noise != "hall":  # whose noise is made of the voice
        assert np.sqrt((rest @ rest) / (alike * quiet @ (alike * quiet))) == pytest.approx(0.5, rel=0.1)
    else:
        assert rest @ rest > 0


def test_a_new_process_says_the_same() -> None:
    """In one process the second would differ: the library goes on in the middle of its jitter."""
    list_ = [(SOMEBODY, "start oxygen at 2 litres"), (SOMEBODY, "start oxygen at 2 litres")]

    one, other = (spoken(list_, random.Random(1)) for _ in range(2))

    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(RATE < len(each) < 4 * RATE and 0.05 < np.abs(each).max() <= 1 for each in one)


def test_without_the_program_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)

    with pytest.raises(ConfigError, match=r"eSpeak NG, which is not here: pip install 'fedloom\[speech\]'"):
        next(Dictation().records("test"))


def test_a_program_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import espeakng_loader

    with pytest.raises(DataError, match=r"eSpeak NG does not work here: it has no voice nobody; install"):
        spoken([(Speaker("nobody", 170, 50), "a")], random.Random(0))
    library = espeakng_loader.get_library_path()
    empty = SimpleNamespace(get_library_path=lambda: library, get_data_path=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "espeakng_loader", empty)
    with pytest.raises(DataError, match="does not work here"):
        spoken([(SOMEBODY, "a")], random.Random(0))


def test_the_run_file_reads_them() -> None:
    config = load_run(EXAMPLE)

    read = load_rows("dictation", (), "test", config.model.task)

    assert len(read) == COUNTS["test"] * len(WARDS)
    assert set(read.groups) == set(WARDS)
    assert config.privacy.delta < 1 / COUNTS["train"]
    assert config.model.audio_seconds == 5
    if not (cache_dir() / "whisper-base").is_dir():
        return
    encoded = encode(read, config.model.built().reader(cache_dir() / "whisper-base"), 448)
    assert max(map(len, encoded.targets)) <= config.model.max_length
