"""Made-up recordings of orders on four wards: what is to be written of them."""

import importlib
import io
import json
import random
import struct
import subprocess
import sys
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedloom.client.data.packaged.api import Split
from fedloom.client.data.packaged.dictation.orders import WARDS, Speaker, Ward, order
from fedloom.client.data.packaged.dictation.rooms import RATE, Wave, heard_in
from fedloom.client.data.records import Record
from fedloom.core.errors import ConfigError, DataError

__all__ = ["Dictation", "recording", "spoken"]

_RECORDINGS = {"train": 400, "test": 60}
"""Of each ward."""
_MOST_SECONDS = 5
"""What takes longer to say is left out."""
_SPARE = 1.4
"""Orders are said for each that is wanted: one in six takes longer."""
_LARGEST = 32767


@dataclass(frozen=True)
class Dictation:
    """Orders dictated on four wards, each with voices, words and noise of its own; drawn from a seed, and nobody's.

    They are said in full and written as the house does: "give metoprolol 50 milligrams by mouth twice a day" is
    metoprolol 50 mg PO BID. They are drawn without regard to what a patient should have. No order that is held out, a
    drug with its dose for instance, is in what is to train on, and half of what is held out is said by a voice that
    says nothing else. eSpeak NG speaks, a program under GPL-3 that is called and no part of this package:
    `fedloom[speech]` installs it. A build of it gives equal samples wherever it runs.
    """

    task: ClassVar[str] = "speech-recognition"

    def records(self, split: Split) -> Iterator[Record]:
        """The recordings of one split, ward by ward, each of at most 5 seconds."""
        for place, (name, ward) in enumerate(WARDS.items()):
            draw, noise = random.Random(f"dictation {split} {name}"), np.random.default_rng([place, split == "test"])
            orders = [order(ward, split, draw) for _ in range(int(_SPARE * _RECORDINGS[split]))]
            speakers = [_speaker(ward, split, at, draw) for at in range(len(orders))]
            voices = spoken([(who, said) for who, (said, _) in zip(speakers, orders, strict=True)], draw)
            number = 0
            for (_, wanted), voice in zip(orders, voices, strict=True):
                heard = heard_in(voice, ward.noise, ward.level, noise)
                if len(heard) <= _MOST_SECONDS * RATE and number < _RECORDINGS[split]:
                    number += 1
                    where = f"dictation {split} {name} {number}"
                    yield Record(where, wanted, group=name, parts=(wanted,), audio=recording(heard))


def _speaker(ward: Ward, split: Split, at: int, draw: random.Random) -> Speaker:
    return ward.guest if split == "test" and at % 2 else draw.choice(ward.speakers)


def spoken(said: Sequence[tuple[Speaker, str]], draw: random.Random) -> list[Wave]:
    """Each text as its speaker says it, a little faster or slower and higher or lower each time.

    Args:
        said: Who says what.
        draw: What decides on speed and pitch.

    Raises:
        ConfigError: eSpeak NG is not installed.
        DataError: It does not work here.
    """
    try:
        loader = importlib.import_module("espeakng_loader")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "dictation is spoken by eSpeak NG, which is not here: pip install 'fedloom[speech]'"
        ) from error
    told = [
        (who.voice, who.rate + draw.randint(-10, 10), who.pitch + draw.randint(-6, 6), 50 + draw.randint(-15, 15), text)
        for who, text in said
    ]
    program = Path(__file__).with_name("espeak.py")
    command = [sys.executable, "-I", "-S", str(program), loader.get_library_path(), loader.get_data_path(), str(RATE)]
    done = subprocess.run(command, input=json.dumps(told).encode(), capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"it ends with {done.returncode}"
        raise DataError(f"eSpeak NG does not work here: {reason}; install espeakng-loader again")
    waves, at = list[Wave](), 0
    for _ in said:
        (count,) = struct.unpack_from("<i", done.stdout, at)
        waves.append(np.frombuffer(done.stdout, "<i2", count, at + 4) / _LARGEST)
        at += 4 + 2 * count
    return waves


def recording(heard: Wave) -> bytes:
    """A WAV file of 16-bit samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(np.round(heard * _LARGEST).astype("<i2").tobytes())
    return file.getvalue()
