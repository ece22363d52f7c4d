"""One number for each text."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedloom.client.tasks.api import Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows

__all__ = ["Regression"]


class Regression(Task):
    """One number for each text, learned by its squared error; RMSE and R² on held-out data."""

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS", labels=False)
    tolerance: float = Field(default=0.5, gt=0)
    """An answer within this of the number counts as right."""

    def read(self, cells: "Cells") -> "Record":
        """A text and a finite number."""
        return cells.filled(cells.string("text"), label=repr(cells.number()))

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """The numbers, float32."""
        return {"labels": np.array([float(record.label) for record in records], np.float32)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A text and its number."""
        return {"text": rows.texts[index], "label": float(rows.labels[index])}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up text with a number from 0 to 2."""
        return {"text": made_up_text(index), "label": float(index % 3)}

    def configure(self, config: Any) -> None:
        """One output."""
        config.num_labels = 1

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Standard normal numbers, float32."""
        return generator.standard_normal(count).astype(np.float32)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Squared error of each example."""
        return (self.answer(scores) - labels).square().flatten()

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """The number itself."""
        return scores.squeeze(-1)

    def right(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Whether it is within `tolerance`."""
        return (self.answer(scores) - labels).abs() <= self.tolerance

    def metrics(self, scores: "torch.Tensor", labels: "torch.Tensor") -> dict[str, float]:
        """Sums that RMSE and R² come from."""
        error, wanted = self.answer(scores).double() - labels.double(), labels.double()
        sums = {"error": error.square().sum(), "sum": wanted.sum(), "squares": wanted.square().sum()}
        return {"n": float(len(labels)), **{name: float(value) for name, value in sums.items()}}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Root of the mean squared error, and the share of the numbers' variance that the answers explain."""
        spread = sums["squares"] - sums["sum"] ** 2 / sums["n"]
        return {"rmse": math.sqrt(sums["error"] / sums["n"]), "r2": 1 - sums["error"] / spread if spread else 0.0}
