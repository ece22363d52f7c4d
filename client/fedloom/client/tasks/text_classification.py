"""One label for each text."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from fedloom.client.tasks.api import Task, Traits

if TYPE_CHECKING:
    from fedloom.client.data.rows import Indices

__all__ = ["TextClassification"]


class TextClassification(Task):
    """One label for each text."""

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS", usual=True)

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Macro F1, Matthews' correlation, area under the ROC curve, and calibration error."""
        from fedloom.client.eval.figures import classification_figures

        return classification_figures(scores, labels)
