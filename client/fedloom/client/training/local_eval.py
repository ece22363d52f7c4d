"""Federated evaluation: sums over the rows a site holds out, to which one row adds no more than the noise covers.

A row adds the vector (1, right, loss) / sqrt(3), each entry cut to [0, 1], so that its L2 norm is at most 1
whatever the model says about it. The sums are released by the Gaussian mechanism on a grid, see `proto.gaussian`; even
the number of rows is noised.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import Encoded, collate, microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.rng import Entropy
from fedloom.client.training.device import on_device
from fedloom.client.training.losses import labelled, loss_of_each
from fedloom.core.privacy.gaussian import UNITS, deviation

__all__ = ["answers", "released", "row_scores", "split"]

Table = npt.NDArray[np.float64]


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """The rows to train on, and about `share` of all, to evaluate on.

    A row's side depends on its own text and on `share` alone: it stays whatever rows come and go, equal rows are on one
    side, and one row more or less moves no other.

    >>> rows = Rows(tuple(map(str, range(1000))), np.zeros(1000, np.int64), ("",) * 1000, ("a", "b"))
    >>> [len(part) for part in split(rows, 0.1)], [len(part) for part in split(rows, 0.0)]
    ([903, 97], [1000, 0])
    """
    if share == 0:
        return rows, rows.take(np.zeros(0, np.int64))
    places = (hashlib.sha256(b"fedloom held out 1\\n" + text.encode()).digest() for text in rows.texts)
    chosen = np.array([int.from_bytes(place[:8], "big") < share * 2.0**64 for place in places], bool)
    return rows.take(np.flatnonzero(~chosen)), rows.take(np.flatnonzero(chosen))


def answers(model: AdapterModel, encoded: Encoded, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model as it is answers, at most `size` rows at a time, in the order of `microbatches`.

    Returns:
        Scores and labels, as a task's loss takes them.
    """
    for part in microbatches(np.arange(len(encoded), dtype=np.int64), encoded, size):
        batch = collate(encoded, part, model.tokenizer.pad_token_id)
        yield model.logits(batch), on_device(batch["labels"], model.device)


def row_scores(model: AdapterModel, encoded: Encoded, size: int, max_loss: float) -> Table:
    """What the model as it is says about each row, no row depending on another.

    Args:
        model: Base model and adapter.
        encoded: n rows with labels.
        size: Most rows in one forward pass.
        max_loss: Loss in nats at which that of a row is cut.

    Returns:
        Shape (n, 2), in [0, 1]: the share of a row's labels that are right, and its mean loss over `max_loss`. A loss
        that is not finite counts as the largest. Rows are in the order of `microbatches`.
    """
    parts = [np.zeros((0, 2))]
    with torch.inference_mode():
        for scores, labels in answers(model, encoded, size):
            loss = (loss_of_each(model.task, scores, labels) / max_loss).nan_to_num(nan=1.0, posinf=1.0)
            scores, labels = model.task.places(scores, labels)
            places = labelled(labels)
            right = (model.task.right(scores, labels) & places).sum(1) / places.sum(1).clamp(min=1)
            parts.append(torch.stack([right.float(), loss.clamp(0, 1)], 1).double().cpu().numpy())
    return np.concatenate(parts)


def released(tables: list[Table], noise_multiplier: float | None, entropy: Entropy) -> tuple[float, ...]:
    """The sums over rows, with noise.

    Args:
        tables: One or two results of `row_scores` of the same n rows, for one or two models.
        noise_multiplier: Standard deviation of each sum's noise. None adds none, which is for runs without privacy.
        entropy: Where the noise comes from.

    Returns:
        (n, right, loss) or (n, right, loss, right, loss), divided by the square root of their number.

    >>> from fedloom.client.privacy.dp_sgd.rng import System
    >>> [round(each, 3) for each in released([np.array([[1.0, 0.5], [0.0, 0.25]])], None, System())]
    [1.155, 0.577, 0.433]
    """
    whole = np.concatenate([np.ones((len(tables[0]), 1)), *tables], axis=1)
    figures = whole.shape[1]
    if noise_multiplier is None:
        return tuple(float(each) for each in (whole.sum(0) / math.sqrt(figures)).astype(np.float32))
    # Each figure of a row in so many steps that all of them together are at most UNITS long; see proto.gaussian.
    steps = math.isqrt(UNITS**2 // figures)
    sums = np.floor(whole * steps).astype(np.int64).sum(0) + entropy.normal(deviation(noise_multiplier), figures)
    return tuple(float(each) for each in (sums / (steps * math.sqrt(figures))).astype(np.float32))
