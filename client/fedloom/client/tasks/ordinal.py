"""One of several grades for each text, of which one is more than the one before it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.client.tasks.api import Task, Traits

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.rows import Indices

__all__ = ["Ordinal"]


class Ordinal(Task):
    """One of several ordered grades for each text, such as a triage level; `labels` names them from the lowest up.

    An output for each grade but the lowest says whether the text is of that grade or a higher one (Niu et al., CVPR
    2016). The answer is the number of outputs that say yes, so that an error of one grade costs less than one of two.
    """

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS")

    def configure(self, config: Any) -> None:
        """An output for each step from one grade to the next."""
        config.num_labels = len(self.labels) - 1

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Grades, of which there is one more than outputs."""
        return generator.integers(classes + 1, size=count)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Mean binary cross-entropy of an example's steps, in nats."""
        import torch
        from torch.nn import functional as F

        steps = torch.arange(scores.shape[-1], device=scores.device) < labels[:, None]
        return F.binary_cross_entropy_with_logits(scores, steps.to(scores.dtype), reduction="none").mean(-1)

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """How many steps are taken."""
        return (scores > 0).sum(-1)

    def metrics(self, scores: "torch.Tensor", labels: "torch.Tensor") -> dict[str, float]:
        """Grades apart from the label, added up."""
        return {"n": float(len(labels)), "apart": float((self.answer(scores) - labels).abs().sum())}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean absolute error in grades."""
        return {"mae": sums["apart"] / max(1.0, sums["n"])}

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Cohen's kappa with quadratic weights: 1 is agreement, 0 that of chance."""
        from sklearn.metrics import cohen_kappa_score

        answers = (scores > 0).sum(-1)
        if len(np.unique(np.concatenate([answers, labels]))) < 2:
            return {}
        grades = list(range(scores.shape[-1] + 1))
        return {"kappa": float(cohen_kappa_score(labels, answers, labels=grades, weights="quadratic"))}
