"""Scores on held-out data that need no protection; of private data see `fedloom.client.training.local_eval`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedloom.client.data.tokens import Encoded
from fedloom.client.eval.confusion import MOST_CLASSES, Confusion, count
from fedloom.client.eval.text_figures import Written
from fedloom.client.eval.writing import written
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.tasks.api import Task
from fedloom.client.training.local_eval import answers
from fedloom.client.training.losses import labelled, loss_of_each

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """Result of an evaluation."""

    accuracy: float
    """Share of right answers: of examples, or of labelled tokens where the task has a label at each token."""
    loss: float
    """Mean loss of the same: cross-entropy in nats, of a language model the logarithm of its perplexity."""
    examples: int
    confusion: Confusion = ()
    """Examples, or labelled tokens, by true and predicted class; empty where there are more than `MOST_CLASSES`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the task has beside these, by name."""
    texts: tuple[Written, ...] = ()
    """What the model wrote, where it was asked to."""


def evaluate(model: AdapterModel, encoded: Encoded, batch: int | None = None, generate: int = 0) -> Score:
    """Accuracy, mean loss and the task's own metrics of the model as it is, on held-out data.

    Args:
        model: Base model and adapter.
        encoded: Rows with labels.
        batch: Rows in one forward pass; None takes `Encoded.evaluation_batch`.
        generate: Rows whose answers the model writes, see `written`; 0 for none, and for tasks that write nothing.

    Raises:
        DataError: It is to write, and no row asks for anything.
        ConfigError: The package that compares texts is missing.
    """
    task, classes = model.task, 0
    more, whole = type(task).metrics is not Task.metrics, type(task).report is not Task.report
    kept: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []
    rows = 0
    counts: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    pairs: list[torch.Tensor] = []
    sums: Counter[str] = Counter()
    with torch.inference_mode():
        for scores, labels in answers(model, encoded, batch or encoded.evaluation_batch):
            each = loss_of_each(task, scores, labels)
            scores, labels = task.places(scores, labels)
            places = labelled(labels)
            counts.append(torch.stack([(task.right(scores, labels) & places).sum(), places.sum()]))
            losses.append(each @ places.sum(1).float())
            classes = len(task.labels) or scores.shape[-1]
            if task.traits.labels and not task.traits.several and classes <= MOST_CLASSES:
                pairs.append(torch.stack([labels, task.answer(scores)]).flatten(1))
            if more:
                sums.update(task.metrics(scores[places], labels[places]))
            if whole:
                own = rows + np.nonzero(places.cpu().numpy())[0]
                kept.append((scores[places].cpu().numpy(), labels[places].cpu().numpy(), own))
                rows += len(places)
    # A device is waited for only here, and where metrics of the task's own need to know which places are labelled.
    right, total = torch.stack(counts).sum(0).tolist() if counts else (0, 0)
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    confusion: Confusion = ()
    if pairs:
        true, predicted = (each.cpu() for each in torch.cat(pairs, 1))
        places = labelled(true)
        confusion = count(true[places].numpy(), predicted[places].numpy(), classes)
    figures = task.summary(sums) if sums or not more else {}
    if kept:
        figures |= task.report(*(np.concatenate(each) for each in zip(*kept, strict=True)))
    texts = tuple(written(model, encoded, generate)) if generate else ()
    if texts:
        figures |= task.report_written(texts)
    return Score(right / max(1, total), loss / max(1, total), len(encoded), confusion, figures, texts)
