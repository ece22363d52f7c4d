"""Any number of labels for each text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.client.tasks.api import Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows

__all__ = ["MultiLabel"]


class MultiLabel(Task):
    """Any number of labels for each text, none too; each is a question of its own, answered by yes or no.

    `label` is a list of names, or in a table their names with `;` between them. Accuracy is the share of right answers
    over all labels and rows.
    """

    traits: ClassVar[Traits] = Traits(
        "text and label, a list", "AutoModelForSequenceClassification", "SEQ_CLS", several=True
    )

    def read(self, cells: "Cells") -> "Record":
        """A text and the names of its labels."""
        return cells.filled(cells.string("text"), tags=cells.labels())

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """1 for each label that a row has and 0 for the others, int64, shape (n, labels)."""
        table = np.zeros((len(records), len(self.labels)), np.int64)
        for row, found in zip(table, classes, strict=True):
            row[found] = 1
        return {"labels": table}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A text and the names of its labels."""
        names = [name for name, held in zip(rows.label_names, rows.labels[index], strict=True) if held]
        return {"text": rows.texts[index], "label": names}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up text with no label, one, or several."""
        return {"text": made_up_text(index), "label": list(self.labels[: index % (len(self.labels) + 1)])}

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Each label or not, at even odds."""
        return generator.integers(2, size=(count, classes))

    def places(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Each label is a place whose answer is no or yes: scores of shape (batch, labels, 2)."""
        import torch

        return torch.stack([torch.zeros_like(scores), scores], -1), labels

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Mean binary cross-entropy over an example's labels, in nats."""
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none").mean(-1)

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """F1 over all labels together and as the mean over them, and the mean area under the ROC curve."""
        from sklearn.metrics import f1_score, roc_auc_score

        count = len(self.labels)
        margins, wanted = (scores[:, 1] - scores[:, 0]).reshape(-1, count), labels.reshape(-1, count)
        figures = {
            f"f1_{mean}": float(f1_score(wanted, margins > 0, average=mean, zero_division=0.0))
            for mean in ("micro", "macro")
        }
        mixed = [column for column in range(count) if 0 < wanted[:, column].sum() < len(wanted)]
        if mixed:
            areas = [roc_auc_score(wanted[:, column], margins[:, column]) for column in mixed]
            figures["auroc"] = float(np.mean(areas))
        return figures
