"""One label for each image."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
from pydantic import Field

from fedloom.client.data.rows import Indices, Rows, picture
from fedloom.client.tasks.api import Task, Traits
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record

__all__ = ["ImageClassification"]


class ImageClassification(Task):
    """One label for each image."""

    traits: ClassVar[Traits] = Traits(
        "image and label", "AutoModelForImageClassification", images=True, holds=("images",)
    )
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side in pixels to which images are brought. None is the base model's own; many can read no other."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """An image and its label."""
        return "image", "label"

    def read(self, cells: "Cells") -> "Record":
        """An image, as the bytes of its file, and its label."""
        return cells.record("", label=cells.label(), image=cells.bytes("image"))

    def columns(self, records: "Sequence[Record]", classes: Sequence[Indices], answers: Answers) -> Mapping[str, Any]:
        """Images and labels."""
        return {**super().columns(records, classes, answers), "images": tuple(record.image for record in records)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """The path of the image's file, and its label."""
        return {"image": picture(index), "label": rows.label_names[rows.labels[index]]}

    def configure(self, config: Any) -> None:
        """The labels, and no head in a vision tower: SigLIP's is for captions, and its classifier does not read it."""
        super().configure(config)
        tower = getattr(config, "vision_config", None)
        if tower is not None and hasattr(tower, "vision_use_head"):
            tower.vision_use_head = False

    def reader(self, folder: Path) -> Any:
        """How the images of a base model's folder are prepared."""
        from fedloom.client.data.media.images import picture_settings

        return picture_settings(folder, self.image_size)

    def sample(self, index: int) -> Mapping[str, object]:
        """An image of noise."""
        from fedloom.client.data.media.images import noise_picture

        return {"image": noise_picture(index), "label": self.labels[index % len(self.labels)]}

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Macro F1, Matthews' correlation, area under the ROC curve, and calibration error."""
        from fedloom.client.eval.figures import classification_figures

        return classification_figures(scores, labels)
