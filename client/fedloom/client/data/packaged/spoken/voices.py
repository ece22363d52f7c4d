"""What eSpeak NG's voices say, as recordings."""

import importlib
import io
import json
import random
import struct
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom.client.data.packaged.spoken.rooms import RATE, Wave
from fedloom.core.errors import ConfigError, DataError

__all__ = ["Speaker", "spoken", "wave_file"]

_LARGEST = 32767


@dataclass(frozen=True)
class Speaker:
    """One of eSpeak NG's voices, as one person speaks."""

    voice: str
    rate: int
    """Words a minute."""
    pitch: int
    """0 to 99."""


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


def wave_file(heard: Wave) -> bytes:
    """A WAV file of 16-bit samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(np.round(heard * _LARGEST).astype("<i2").tobytes())
    return file.getvalue()
