"""What is said in a recording, by a model such as Whisper."""

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from fedloom.client.data.rows import Rows, recording_path
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.client.tasks.generation.seq2seq import read_before
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices
    from fedloom.client.eval.text_figures import Written

__all__ = ["SpeechRecognition"]


class SpeechRecognition(Task):
    """What is said in a recording, written down by a model such as Whisper.

    `max_length` counts the transcript's tokens. A recording is brought to the model's rate and length; what is
    longer is cut off.
    """

    audio_seconds: int | None = Field(default=None, ge=1, le=3600)
    """Whole seconds of a recording that the model reads, for which it is cut down. None is the base model's own."""

    traits: ClassVar[Traits] = Traits(
        "audio and text",
        "AutoModelForSpeechSeq2Seq",
        labels=False,
        generates=True,
        per_token=True,
        decoder=True,
        audio=True,
        holds=("audio", "parts"),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A recording and its transcript."""
        return "audio", "text"

    def read(self, cells: "Cells") -> "Record":
        """A recording, as the bytes of its file, and its transcript."""
        text = cells.string("text")
        return cells.filled(text, audio=cells.bytes("audio"), parts=(text,))

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """Recordings and transcripts."""
        return {"audio": tuple(each.audio for each in records), "parts": tuple(each.parts for each in records)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """The path of the recording's file, and its transcript."""
        return {"audio": recording_path(index), "text": rows.parts[index][0]}

    def sample(self, index: int) -> Mapping[str, object]:
        """Noise, and a made-up text."""
        from fedloom.client.data.media.audio import noise_recording

        return {"audio": noise_recording(index), "text": made_up_text(index)}

    def reader(self, folder: Path) -> Any:
        """How the recordings and transcripts of a base model's folder are prepared."""
        from fedloom.client.data.media.audio import speech_reader

        return speech_reader(folder, self.audio_seconds)

    def adjust(self, model: Any, reader: Any) -> None:
        """Keep the positions that a recording of `audio_seconds` has; the others would be silence."""
        from fedloom.client.data.media.audio import keep_positions

        if self.audio_seconds is not None:
            keep_positions(model, reader.extractor)

    def encode(self, rows: Rows, tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The transcript's tokens, without the one that the decoder begins with."""
        texts = [text for (text,) in rows.parts]
        for ids in tokenizer.tokenizer(texts)["input_ids"]:
            yield np.zeros(0, np.int32), np.asarray(ids[ids[:1] == [tokenizer.start] :][:max_length], np.int32)

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """At each token of the transcript, given the recording and the tokens before it."""
        features, before = batch["input_features"], read_before(batch["labels"], model.config)
        scores: torch.Tensor = model(input_features=features, decoder_input_ids=before).logits
        return scores

    def report_written(self, pairs: "Sequence[Written]") -> dict[str, float]:
        """Errors in words and in characters, and the share that is as wanted."""
        from fedloom.client.eval.text_figures import speech_figures

        return speech_figures(pairs)
