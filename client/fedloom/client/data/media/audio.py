"""Recordings: their identity, and the numbers a speech model reads."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.client.data.media.with_tokenizer import WithTokenizer
from fedloom.core.errors import ConfigError, DataError, ModelError

__all__ = [
    "FORMATS",
    "LARGEST",
    "SUFFIXES",
    "Samples",
    "SpeechReader",
    "at_rate",
    "decoded",
    "fingerprint",
    "keep_positions",
    "noise_recording",
    "shorten",
    "speech_reader",
]

FORMATS = ("WAV", "FLAC", "OGG", "MP3")

SUFFIXES = (".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wave")
"""Ends of the names of recordings, in small letters."""

_MOST_SECONDS = 3600
LARGEST = 32767
"""The sample of a wave at 1."""

Samples = npt.NDArray[np.int16]


def decoded(data: bytes, where: str) -> tuple[Samples, int]:
    """A recording's samples, the mean of its channels, and how many there are in a second.

    Raises:
        DataError: It is no recording of a known format, is empty, or is longer than an hour.
        ConfigError: The package that reads recordings is missing.
    """
    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                raise DataError(f"{where} is a recording in {file.format}; write it as one of {', '.join(FORMATS)}")
            if not 0 < file.frames <= _MOST_SECONDS * file.samplerate:
                raise DataError(
                    f"{where} has {file.frames / file.samplerate:g} s; more than 0 and at most an hour is read"
                )
            channels, rate = file.read(dtype="float64", always_2d=True), int(file.samplerate)
    except DataError:
        raise
    except Exception as error:  # whatever a reader of formats makes of bytes that are none
        raise DataError(
            f"{where} cannot be read as a recording; write it again as one of {', '.join(FORMATS)}, or remove it"
        ) from error
    return _whole(channels.mean(1)), rate


def at_rate(data: bytes, where: str, rate: int) -> Samples:
    """A recording's samples, the mean of its channels, at so many a second.

    Raises:
        DataError: As by `decoded`.
        ConfigError: As by `decoded`.
    """
    from scipy.signal import resample_poly

    samples, own = decoded(data, where)
    if own == rate:
        return samples
    divisor = np.gcd(own, rate)
    return _whole(resample_poly(samples / LARGEST, rate // divisor, own // divisor))


def _whole(wave: npt.NDArray[np.float64]) -> Samples:
    return (wave.clip(-1, 1) * LARGEST).round().astype(np.int16)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ConfigError(
            "recordings are read by soundfile, which is not here: pip install 'fedloom[audio]'"
        ) from error
    return soundfile


def fingerprint(data: bytes, where: str) -> str:
    """What stands for a recording in the privacy account: its length and the SHA-256 of its samples.

    Raises:
        DataError: It cannot be decoded.
    """
    samples, rate = decoded(data, where)
    return f"recording {len(samples)}/{rate} {hashlib.sha256(samples.tobytes()).hexdigest()}"


def noise_recording(seed: int) -> bytes:
    """A file of half a second of noise, for checks that must not touch real data."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(-LARGEST // 4, LARGEST // 4, 8000).astype(np.int16)
    _soundfile().write(file, noise, 16000, format="WAV")
    return file.getvalue()


@dataclass(frozen=True)
class SpeechReader(WithTokenizer):
    """How a model's recordings and transcripts are prepared.

    Args:
        tokenizer: The model's; what it has is found here too.
        extractor: transformers' feature extractor: spectrograms of one length from samples.
        start: Id of the token that a transcript begins with in the decoder.
    """

    extractor: Any
    start: int

    def save_pretrained(self, folder: str) -> None:
        """Write the files that transformers reads both from."""
        self.tokenizer.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    def prepared(self, data: bytes, where: str) -> Samples:
        """The recording at the model's rate, as long as the model reads: cut off, or with silence behind it."""
        length = int(self.extractor.n_samples)
        samples = at_rate(data, where, int(self.extractor.sampling_rate))
        return np.pad(samples[:length], (0, max(0, length - len(samples))))

    def inputs(self, prepared: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """What the model reads: input_features, shape (n, bands, frames)."""
        waves = [each.astype(np.float32) / LARGEST for each in prepared]
        found = self.extractor(waves, sampling_rate=self.extractor.sampling_rate, return_tensors="np")
        return {"input_features": np.asarray(found["input_features"], np.float32)}

    def drawn(self, generator: np.random.Generator) -> npt.NDArray[Any]:
        """A made-up recording as `prepared` leaves one."""
        return generator.integers(-LARGEST // 4, LARGEST // 4, int(self.extractor.n_samples)).astype(np.int16)


def speech_reader(folder: Path, seconds: int | None = None) -> SpeechReader:
    """How the base model in `folder` wants its recordings and transcripts.

    Args:
        folder: The model's.
        seconds: Length that recordings are brought to; None is the model's own.

    Raises:
        ModelError: It has no tokenizer or feature extractor that can be used, or no first token of a transcript, or
            reads fewer seconds.
    """
    from transformers import AutoFeatureExtractor

    from fedloom.client.models.loading_context import LOCAL_ONLY
    from fedloom.client.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, **LOCAL_ONLY)
        start = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["decoder_start_token_id"])
        int(extractor.n_samples)
    except Exception as error:  # whatever another's code makes of another's files
        raise ModelError(
            f"{folder} does not say how recordings are read ({type(error).__name__}: {error}); it needs a "
            "preprocessor_config.json of fixed length, as Whisper has, and decoder_start_token_id in its config.json"
        ) from error
    shorten(extractor, seconds, folder)
    return SpeechReader(tokenizer, extractor, start)


def shorten(extractor: Any, seconds: int | None, folder: Path) -> None:
    """Have Whisper's feature extractor bring recordings to another length than its own.

    Args:
        extractor: Of the model in `folder`; it is changed.
        seconds: The length; None leaves it.
        folder: For errors.

    Raises:
        ModelError: It is longer than the model's own.
    """
    if seconds is None:
        return
    rate = int(extractor.sampling_rate)
    if seconds * rate > extractor.n_samples:
        own = extractor.n_samples / rate
        raise ModelError(f"model.audio_seconds = {seconds}, and the model in {folder} reads {own:g}; set no more")
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * rate
    extractor.nb_max_frames = extractor.n_samples // int(extractor.hop_length)


def keep_positions(model: Any, extractor: Any) -> None:
    """Cut a model's table of positions to those of a recording as long as `extractor` brings it to.

    Exact: a position's entry does not depend on how many there are, and the model is one of transformers' with fewer
    (`max_source_positions`).

    Args:
        model: Whisper or its encoder with a head: two convolutions make frames to positions.
        extractor: Its own, or with fewer samples.

    Raises:
        ModelError: It is built otherwise, or a recording's frames are no whole positions.
    """
    try:
        encoder = model.get_encoder()
        frames, table = int(extractor.nb_max_frames), encoder.embed_positions.weight
        step = int(encoder.conv1.stride[0]) * int(encoder.conv2.stride[0])
        whole = int(model.config.max_source_positions)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no table of positions behind two convolutions, as Whisper has; remove "
            "model.audio_seconds"
        ) from error
    kept = frames // step
    if frames % step or not 0 < kept <= whole:
        raise ModelError(
            f"{frames} frames of a recording give no whole number of positions up to {whole}, of {step} frames each; "
            "set another model.audio_seconds"
        )
    if kept < whole:
        # A copy, so that the rest of the table is not kept in memory and not written to a merged model's file.
        encoder.embed_positions.weight.data = table.data[:kept].clone()
        encoder.embed_positions.num_embeddings = kept
        model.config.max_source_positions = kept
