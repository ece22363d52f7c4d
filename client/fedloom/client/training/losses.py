"""The loss of each example, a function of that example alone.

DP-SGD bounds what one example adds to a sum of per-example gradients. A loss that divides by a count over the
batch, as Hugging Face's `model(labels=...)` does with the batch's tokens, lets one example rescale the gradients
of the others before they are clipped, and the noise no longer covers what it changes. So nothing here reduces
over the batch: a mean is only taken over an example's own positions.

Labels lie where the scores are that must predict them; `encode` puts a causal language model's one place to the
left, so that all tasks share one formula.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fedloom.client.data.rows import IGNORED
from fedloom.core.errors import ModelError

if TYPE_CHECKING:
    from fedloom.client.tasks.api import Task

__all__ = ["labelled", "loss_of_each", "per_example", "positions"]


def loss_of_each(task: "Task", scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The task's loss of each example, shape (batch,).

    Raises:
        ModelError: It is not one number for each example.
    """
    found = task.loss(scores, labels)
    if found.shape != labels.shape[:1]:
        raise ModelError(
            f"{type(task).__name__}.loss gives shape {tuple(found.shape)} for a batch of {len(labels)}; return one "
            f"number for each example, shape ({len(labels)},), and reduce nothing over the batch"
        )
    return found


def per_example(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example in nats: the mean over its own labelled positions.

    An example without a labelled position has loss 0 and gradient 0.

    Args:
        scores: Shape (batch, classes), or (batch, length, classes) for a score at each token; float32.
        labels: int64, shape (batch,) or (batch, length): class at each place, `IGNORED` where there is none.

    Returns:
        Shape (batch,). Entry i and its gradient depend on row i of `scores` and `labels` only.

    >>> scores = torch.zeros(2, 3, 4)
    >>> [round(float(each), 4) for each in per_example(scores, torch.tensor([[0, 1, IGNORED], [IGNORED] * 3]))]
    [1.3863, 0.0]
    """
    scores, labels = positions(scores, labels)
    each = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view_as(labels).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Where there is a label: everywhere that is not `IGNORED`, and everywhere if labels are no classes but numbers."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def positions(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of shape (batch, places, classes) and labels of shape (batch, places): one place if a row has one label.

    >>> [tuple(each.shape) for each in positions(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]
    [(2, 1, 4), (2, 1)]
    """
    return (scores[:, None], labels[:, None]) if labels.dim() == 1 else (scores, labels)
