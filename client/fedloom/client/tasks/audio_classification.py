"""One label for each recording."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
from pydantic import Field

from fedloom.client.data.rows import Indices, Rows, recording_path
from fedloom.client.tasks.api import Task, Traits
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record

__all__ = ["AudioClassification"]


class AudioClassification(Task):
    """One label for each recording, by a model such as Whisper's encoder, AST, Wav2Vec2 or HuBERT.

    A recording is brought to the model's rate, and all to one length: the end of a longer one is cut off, silence goes
    behind a shorter one.
    """

    traits: ClassVar[Traits] = Traits(
        "audio and label", "AutoModelForAudioClassification", audio=True, holds=("audio",)
    )
    audio_seconds: int | None = Field(default=None, ge=1, le=3600)
    """Whole seconds of a recording that the model reads, for which Whisper's is cut down. None is the base model's own;
    Wav2Vec2 and HuBERT have none, and AST reads no other."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A recording and its label."""
        return "audio", "label"

    def read(self, cells: "Cells") -> "Record":
        """A recording, as the bytes of its file, and its label."""
        return cells.record("", label=cells.label(), audio=cells.bytes("audio"))

    def columns(self, records: "Sequence[Record]", classes: Sequence[Indices], answers: Answers) -> Mapping[str, Any]:
        """Recordings and labels."""
        return {**super().columns(records, classes, answers), "audio": tuple(record.audio for record in records)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """The path of the recording's file, and its label."""
        return {"audio": recording_path(index), "label": rows.label_names[rows.labels[index]]}

    def reader(self, folder: Path) -> Any:
        """How the recordings of a base model's folder are prepared."""
        from fedloom.client.data.media.recordings import recording_reader

        return recording_reader(folder, self.audio_seconds)

    def adjust(self, model: Any, reader: Any) -> None:
        """Keep the positions that a recording of `audio_seconds` has; models of waves have no table of them."""
        from fedloom.client.data.media.audio import keep_positions

        if self.audio_seconds is not None and hasattr(reader.extractor, "nb_max_frames"):
            keep_positions(model, reader.extractor)

    def sample(self, index: int) -> Mapping[str, object]:
        """Noise."""
        from fedloom.client.data.media.audio import noise_recording

        return {"audio": noise_recording(index), "label": self.labels[index % len(self.labels)]}

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Macro F1, Matthews' correlation, area under the ROC curve, and calibration error."""
        from fedloom.client.eval.figures import classification_figures

        return classification_figures(scores, labels)
