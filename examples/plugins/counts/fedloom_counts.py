"""One count for each text: Poisson regression, with deviance on held-out data."""

from typing import ClassVar

import numpy as np
from pydantic import Field

from fedloom.client.tasks.api import Task, Traits, made_up_text

__all__ = ["Counts"]

_MOST = 2**24
"""Whole numbers up to here are exact in float32."""


class Counts(Task):
    """One count for each text, such as the days of a stay; the model's output is the log of the Poisson rate."""

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS", labels=False)
    tolerance: int = Field(default=0, ge=0)
    """An answer that is off by at most this many counts as right."""

    def read(self, cells):
        count = cells.number()
        if count != int(count) or not 0 <= count <= _MOST:
            raise cells.fault(f"has a {cells.name('label')} that is no whole number from 0 to {_MOST}; correct it")
        return cells.filled(cells.string("text"), label=str(int(count)))

    def columns(self, records, classes, answers):
        return {"labels": np.array([float(record.label) for record in records], np.float32)}

    def document(self, rows, index):
        return {"text": rows.texts[index], "label": int(rows.labels[index])}

    def sample(self, index):
        return {"text": made_up_text(index), "label": index % 3}

    def configure(self, config):
        config.num_labels = 1

    def draw(self, generator, count, classes):
        return generator.poisson(2, count).astype(np.float32)

    def loss(self, scores, labels):
        """-log P(label) in nats; log(label!) does not move the gradient, and keeps the loss from being negative."""
        log_rate = scores.squeeze(-1)
        return log_rate.exp() - labels * log_rate + (labels + 1).lgamma()

    def answer(self, scores):
        return scores.squeeze(-1).exp().round()

    def right(self, scores, labels):
        return (self.answer(scores) - labels).abs() <= self.tolerance

    def metrics(self, scores, labels):
        """Sums that the deviance comes from: 2 (y log(y / rate) - y + rate), McCullagh and Nelder 1989, section 2.3."""
        log_rate, count = scores.squeeze(-1).double(), labels.double()
        rate = log_rate.exp()
        deviance = 2 * (count.xlogy(count) - count * log_rate - count + rate)
        return {"n": len(labels), "deviance": float(deviance.sum()), "error": float((rate - count).abs().sum())}

    def summary(self, sums):
        return {"deviance": sums["deviance"] / sums["n"], "mean_error": sums["error"] / sums["n"]}
