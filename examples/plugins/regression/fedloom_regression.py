"""One number for each text: squared error, with RMSE and R² on held-out data."""

import math
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedloom.client.tasks.api import Task, Traits, made_up_text

__all__ = ["Regression"]


class Regression(Task):
    """One number for each text, learned by its squared error."""

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS", labels=False)
    tolerance: float = Field(default=0.5, gt=0)
    """An answer within this of the number counts as right."""

    def read(self, cells):
        return cells.filled(cells.string("text"), label=repr(cells.number()))

    def columns(self, records, classes, answers):
        return {"labels": np.array([float(record.label) for record in records], np.float32)}

    def document(self, rows, index):
        return {"text": rows.texts[index], "label": float(rows.labels[index])}

    def sample(self, index):
        return {"text": made_up_text(index), "label": float(index % 3)}

    def configure(self, config):
        config.num_labels = 1

    def draw(self, generator, count, classes):
        return generator.standard_normal(count).astype(np.float32)

    def loss(self, scores, labels):
        return (self.answer(scores) - labels).square().flatten()

    def answer(self, scores):
        return scores.squeeze(-1)

    def right(self, scores, labels):
        return (self.answer(scores) - labels).abs() <= self.tolerance

    def metrics(self, scores, labels):
        error, wanted = self.answer(scores).double() - labels.double(), labels.double()
        sums = {"n": len(labels), "error": error.square().sum(), "sum": wanted.sum(), "squares": wanted.square().sum()}
        return {name: float(value) for name, value in sums.items()}

    def summary(self, sums):
        spread = sums["squares"] - sums["sum"] ** 2 / sums["n"]
        return {"rmse": math.sqrt(sums["error"] / sums["n"]), "r2": 1 - sums["error"] / spread if spread else 0.0}
