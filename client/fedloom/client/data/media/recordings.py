"""The numbers that a model of sounds reads of a recording."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedloom.client.data.media.audio import LARGEST, Samples, at_rate, shorten
from fedloom.core.errors import ModelError

__all__ = ["RecordingReader", "recording_reader"]

_STEP, _FRAME = 100, 40
"""A frame of a spectrogram begins every 1/100 s and takes 1/40 s: Kaldi's, which AST has."""


@dataclass(frozen=True)
class RecordingReader:
    """How a model's recordings are prepared.

    Args:
        extractor: transformers' feature extractor: a spectrogram, or a scaled wave, of one length from any samples.
        length: Samples that it takes at most, at its own rate.
    """

    extractor: Any
    length: int

    pad_token_id = 0
    """Recordings of one model have one length, so nothing is padded; collating asks all the same."""

    @property
    def seconds(self) -> float:
        """What it takes at most."""
        return self.length / self.rate

    @property
    def rate(self) -> int:
        """Samples in a second."""
        return int(self.extractor.sampling_rate)

    def prepared(self, data: bytes, where: str) -> Samples:
        """The recording at the model's rate. Its end is cut off; what is shorter than one frame gets silence behind it.

        Silence behind any other is the extractor's business: it fills up what it makes of the samples.
        """
        samples = at_rate(data, where, self.rate)[: self.length]
        return np.pad(samples, (0, max(0, self.rate // _FRAME - len(samples))))

    def inputs(self, prepared: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """What the model reads: a spectrogram or a wave, by the model's name of it, of one shape for all."""
        waves = [each.astype(np.float32) / LARGEST for each in prepared]
        size = {"padding": "max_length", "max_length": self.length, "truncation": True}
        found = self.extractor(waves, sampling_rate=self.rate, return_tensors="np", **size)
        name = self.extractor.model_input_names[0]
        return {name: np.asarray(found[name], np.float32)}

    def drawn(self, generator: np.random.Generator) -> Samples:
        """Noise of the greatest length."""
        return generator.integers(-LARGEST // 4, LARGEST // 4, self.length).astype(np.int16)

    def save_pretrained(self, folder: str) -> None:
        """Write preprocessor_config.json, which transformers' AutoFeatureExtractor reads."""
        self.extractor.save_pretrained(folder)


def recording_reader(folder: Path, seconds: int | None) -> RecordingReader:
    """How the base model in `folder` wants its recordings.

    Args:
        folder: The base model.
        seconds: Length that recordings are brought to; None is the model's own, which models of waves do not have.

    Raises:
        ModelError: It has no feature extractor of a known kind, or `seconds` does not go with it.
    """
    from transformers import AutoFeatureExtractor

    from fedloom.client.models.loading_context import LOCAL_ONLY

    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, **LOCAL_ONLY)
        rate, kind = int(extractor.sampling_rate), _kind(extractor)
    except Exception as error:  # whatever another's code makes of another's files
        raise ModelError(
            f"{folder} does not say how recordings are read ({type(error).__name__}: {error}); it needs a "
            "preprocessor_config.json such as those of Whisper, AST, Wav2Vec2 and HuBERT"
        ) from error
    if kind == "Whisper":
        shorten(extractor, seconds, folder)
        return RecordingReader(extractor, int(extractor.n_samples))
    if kind == "AST":
        length = rate // _STEP * (int(extractor.max_length) - 1) + rate // _FRAME
        if seconds is not None:
            raise ModelError(
                f"the model in {folder} reads {length / rate:g} s and no other length; remove model.audio_seconds"
            )
        return RecordingReader(extractor, length)
    if seconds is None:
        raise ModelError(
            f"the model in {folder} reads recordings of any length, and all need the same; set model.audio_seconds to "
            "the seconds of the longest: the end of a longer one is cut off, silence goes behind a shorter one"
        )
    return RecordingReader(extractor, seconds * rate)


def _kind(extractor: Any) -> Literal["Whisper", "AST", "waves"]:
    """What an extractor makes of a recording.

    Raises:
        ValueError: Nothing that is known.
    """
    if hasattr(extractor, "n_samples"):
        return "Whisper"
    if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):
        return "AST"
    if extractor.feature_size == 1 and extractor.model_input_names[0] == "input_values":
        return "waves"
    raise ValueError(f"{type(extractor).__name__} is none of Whisper, of AST or of waves")
