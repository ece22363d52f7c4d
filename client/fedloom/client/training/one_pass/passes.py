"""The gradients of several clients' samples, in as few passes as memory allows."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedloom.client.data.rows import Indices
from fedloom.client.data.tokens import Encoded, Uniform, collate, microbatches, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.grad_sample.grouped import Layers, adapter_layers, grouped
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.training.device import on_device
from fedloom.client.training.losses import loss_of_each
from fedloom.client.training.microbatch import Microbatch

__all__ = ["Sample", "alike", "gradients", "layers_of"]


@dataclass(frozen=True, eq=False)
class Sample:
    """What one client needs the gradients of."""

    client: str
    """Its name, by which samples are put in order."""
    model: AdapterModel
    """A twin of the others', with this client's adapter."""
    encoded: Encoded
    """All its examples."""
    indices: Indices
    """Those that are in the sample; may be none."""
    microbatch: Microbatch
    longest: int
    """Most tokens of an example."""
    optimizer: PrivateOptimizer | None
    """Gets the clipped sum; None without privacy."""
    parameters: Sequence[nn.Parameter] = ()
    """Without privacy: they get the gradient of the sum of the examples' losses over `count`."""
    count: int = 0

    @property
    def tape(self) -> Tape | None:
        """Of the private optimizer."""
        return None if self.optimizer is None else self.optimizer.tape

    def restart(self) -> None:
        """Forget what an attempt that failed has added."""
        if self.optimizer is not None:
            self.optimizer.restart()
        for parameter in self.parameters:
            parameter.grad = None

    def parts(self, size: int) -> Iterator[Uniform]:
        """The microbatches that this client alone would make of it."""
        if self.tape is not None:
            yield from uniform_microbatches(self.indices, self.encoded, size, self.longest)
            return
        for rows in microbatches(self.indices, self.encoded, size):
            yield Uniform(rows, len(rows), max(self.encoded.length(row) for row in rows) or None)


_Share = tuple[Sample, Uniform]


def layers_of(model: AdapterModel) -> Layers:
    """The layers of a model's adapter.

    Raises:
        ModelError: See `adapter_layers`.
    """
    if model not in _layers:
        _layers[model] = adapter_layers(model.model, [slot.parameter for slot in model.slots.values()])
    return _layers[model]


_layers: "weakref.WeakKeyDictionary[AdapterModel, Layers]" = weakref.WeakKeyDictionary()


def alike(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that may share a pass: of models with the same frozen weights, that train the same tensors.

    One whose frozen weights are corrected goes alone.
    """
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        trained = tuple(name for name, slot in sample.model.slots.items() if slot.parameter.requires_grad)
        key = sample.model if sample.model.corrections else (trained, sample.tape is None)
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def gradients(samples: Sequence[Sample], size: int) -> None:
    """Leave the gradients of each with its optimizer, from nothing, with at most `size` examples in a pass."""
    for sample in samples:
        sample.restart()
    for shares in _passes([(sample, part) for sample in samples for part in sample.parts(size)], size):
        _pass(shares)


def _passes(shares: list[_Share], size: int) -> Iterator[list[_Share]]:
    """Shares of like length and number that fit into one pass; of private clients only such as are padded alike."""
    now: list[_Share] = []
    for share in sorted(shares, key=lambda each: (each[1].length or 0, len(each[1].rows))):
        sample, part = share
        full = sum(len(each.rows) for _, each in now) + len(part.rows) > size
        twice = any(each is sample for each, _ in now)
        unlike = bool(now) and sample.tape is not None and part.length != now[0][1].length
        if now and (full or twice or unlike):
            yield now
            now = []
        now.append(share)
    if now:
        yield now


def _pass(shares: Sequence[_Share]) -> None:
    first = shares[0][0].model
    longest = max((part.length or 0 for _, part in shares)) or None
    batches = [collate(each.encoded, part.rows, first.tokenizer.pad_token_id, longest) for each, part in shares]
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
    rows, sequences = [len(part.rows) for _, part in shares], shares[0][0].encoded.sequences
    tapes = [sample.tape for sample, _ in shares if sample.tape is not None]
    for tape, count in zip(tapes, rows, strict=False):
        tape.begin(count, sequences)
    of_batch = [count * sequences for count in rows]
    with grouped([layers_of(sample.model) for sample, _ in shares], of_batch, tapes or None):
        losses = loss_of_each(first.task, first.logits(batch), on_device(batch["labels"], first.device))
        if not tapes:  # each client's mean, whose parameters are its own
            weights = np.repeat([1 / each.count for each, _ in shares], rows).astype(np.float32)
            losses = losses * on_device(torch.from_numpy(weights), first.device)
        torch.autograd.backward(losses.sum())
    for sample, part in shares:
        if sample.optimizer is not None:
            sample.optimizer.accumulate(part.real)
