"""Learned coefficients of finished adapters, one for each adapter and layer (aTLAS, arXiv 2407.02880)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call

from fedloom.client.data.tokens import Encoded, collate, microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.core.errors import ModelError

__all__ = ["Learned", "learn_coefficients"]

_BATCH = 16
"""Rows in one forward pass; memory alone depends on it."""


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Args:
        coefficients: By module, one for each adapter.
        before: Mean loss on the rows with equal coefficients 1 / n, in nats.
        after: With the learned ones; never above `before`.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    before: float
    after: float


def learn_coefficients(
    model: AdapterModel, rows: Encoded, ranks: Mapping[str, Sequence[int]], steps: int, rate: float
) -> Learned:
    """Minimise the mean loss on all rows over the coefficients, by Adam without noise.

    It begins at the soup, 1 / n each, where the paper begins at 0, and gives the best of what it came through. Every
    step looks at all rows: there is no chance in it.

    The rows are not protected. The result is a function of them that nothing is added to.

    Args:
        model: PEFT model whose pairs hold the adapters' factors side by side, with the scale in B and zeros at the end.
        rows: At least one.
        ranks: By module, the adapters' ranks in the order in which they lie in its pair.
        steps: Of Adam, at least 1.
        rate: Its learning rate, above 0.

    Raises:
        ModelError: The loss is not finite.

    Source: Zhang et al., NeurIPS 2024, arXiv 2407.02880, section 3.
    """
    places = {
        f"{module}.lora_B.default.weight": torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))
        for module, each in ranks.items()
    }
    parameters = {name: each.detach() for name, each in model.model.named_parameters() if name in places}
    count = len(next(iter(ranks.values())))
    learned = torch.full((len(places), count), 1 / count, requires_grad=True)
    optimizer = torch.optim.Adam([learned], lr=rate)
    best, losses = learned.detach().clone(), list[float]()
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = _loss(model, rows, learned, places, parameters)
        if not np.isfinite(loss):
            raise ModelError(f"the loss on the rows is {loss} after {len(losses)} steps; lower --learning-rate")
        if not losses or loss < min(losses):
            best = learned.detach().clone()
        losses.append(loss)
        optimizer.step()
    found = {module: tuple(float(each) for each in line) for module, line in zip(ranks, best, strict=True)}
    return Learned(found, losses[0], min(losses))


def _loss(
    model: AdapterModel,
    rows: Encoded,
    coefficients: torch.Tensor,
    places: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
) -> float:
    """The mean loss; its gradient is added to that of the coefficients."""
    total = 0.0
    for part in microbatches(np.arange(len(rows), dtype=np.int64), rows, _BATCH):
        batch = collate(rows, part, model.tokenizer.pad_token_id)
        changed: dict[str, torch.Tensor] = {}
        for line, (name, where) in zip(coefficients, places.items(), strict=True):
            factor = torch.zeros(parameters[name].shape[1])
            changed[name] = parameters[name] * factor.index_add(0, torch.arange(len(where)), line[where])
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        scores = functional_call(model.model, changed, (), inputs).logits.float()
        loss = model.task.loss(scores, batch["labels"].to(model.device)).sum() / len(rows)
        torch.autograd.backward(loss)
        total += loss.item()
    return total
