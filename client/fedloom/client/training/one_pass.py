"""Clients whose examples go through the model in one pass, step by step, each with an adapter of its own.

Each client's trainer does its round in a thread and on a twin of the model, as clients at once do: it draws its own
samples, clips, adds its own noise, and takes its own steps. Only where it needs the gradients of a sample does it wait
for the others, and one of them computes for all.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from fedloom.client.data.rows import Indices
from fedloom.client.data.tokens import Encoded, Uniform, collate, microbatches, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.grad_sample.grouped import Layers, adapter_layers, grouped
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.training.device import on_device
from fedloom.client.training.microbatch import Microbatch

__all__ = ["OnePass", "Sample", "gradients", "layers_of"]


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
    optimizer: torch.optim.Optimizer | PrivateOptimizer
    """A private one gets the clipped sum. Another one's parameters get the gradient of the sample's mean loss."""
    tape: Tape | None
    """Of the private optimizer."""

    def restart(self) -> None:
        """Forget what an attempt that failed has added."""
        if isinstance(self.optimizer, PrivateOptimizer):
            self.optimizer.restart()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def parts(self, size: int) -> Iterator[Uniform]:
        """The microbatches that this client alone would make of it."""
        if self.tape is not None:
            yield from uniform_microbatches(self.indices, self.encoded, size, self.longest)
            return
        for rows in microbatches(self.indices, self.encoded, size):
            lengths = [len(self.encoded.input_ids[row]) for row in rows] if self.encoded.input_ids else []
            yield Uniform(rows, len(rows), max(lengths, default=None))


_Share = tuple[Sample, Uniform]


@dataclass(eq=False)
class _Waiting:
    sample: Sample
    done: bool = False
    error: BaseException | None = field(default=None)


class OnePass:
    """Where trainers in several threads meet for the gradients of a step.

    Args:
        at_once: How many of them have turns at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once, self._turns = at_once, 0
        self._moved = threading.Condition()
        self._waiting: list[_Waiting] = []

    def expect(self, turns: int) -> None:
        """So many further turns will be had, each of which ends with `ended`, whatever it did."""
        with self._moved:
            self._turns += turns

    def ended(self) -> None:
        """A turn is over or will not be had: nobody waits for it."""
        with self._moved:
            self._turns -= 1
            self._moved.notify_all()

    def close(self) -> None:
        """Nobody waits for anybody from now on."""
        with self._moved:
            self._at_once = 0
            self._moved.notify_all()

    def compute(self, sample: Sample) -> None:
        """Leave the gradients of a sample with its optimizer, once all that have a turn have come here or ended it.

        Raises:
            ModelError: Memory runs out with a single example; or see `grouped`. Everybody in the pass gets it.
        """
        mine = _Waiting(sample)
        with self._moved:
            self._waiting.append(mine)
            self._moved.notify_all()
            self._moved.wait_for(lambda: mine.done or self._all_here)
            if not mine.done:
                together, self._waiting = self._waiting, []
                self._do(together)
        if mine.error is not None:
            raise mine.error

    @property
    def _all_here(self) -> bool:
        return len(self._waiting) >= min(self._at_once, self._turns)

    def _do(self, together: Sequence[_Waiting]) -> None:
        """The others wait for the lock meanwhile; they have nothing else to do."""
        error: BaseException | None = None
        try:
            for alike in _alike(sorted((each.sample for each in together), key=lambda each: each.client)):
                microbatch = min((each.microbatch for each in alike), key=lambda each: each.size)
                microbatch.attempt(sum(len(each.indices) for each in alike), partial(gradients, alike))
        except BaseException as caught:  # raised again in each of their threads
            error = caught
        for each in together:
            each.done, each.error = True, error
        self._moved.notify_all()


def layers_of(model: AdapterModel) -> Layers:
    """The layers of a model's adapter.

    Raises:
        ModelError: See `adapter_layers`.
    """
    if model not in _layers:
        _layers[model] = adapter_layers(model.model, [slot.parameter for slot in model.slots.values()])
    return _layers[model]


_layers: "weakref.WeakKeyDictionary[AdapterModel, Layers]" = weakref.WeakKeyDictionary()


def _alike(samples: Sequence[Sample]) -> list[list[Sample]]:
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
    rows = [len(part.rows) for _, part in shares]
    tapes = [sample.tape for sample, _ in shares if sample.tape is not None]
    for tape, count in zip(tapes, rows, strict=False):
        tape.begin(count)
    with grouped([layers_of(sample.model) for sample, _ in shares], rows, tapes or None):
        losses = first.task.loss(first.logits(batch), on_device(batch["labels"], first.device))
        if not tapes:  # each client's mean, whose parameters are its own
            weights = np.repeat([1 / len(each.indices) for each, _ in shares], rows).astype(np.float32)
            losses = losses * on_device(torch.from_numpy(weights), first.device)
        torch.autograd.backward(losses.sum())
    for sample, part in shares:
        if isinstance(sample.optimizer, PrivateOptimizer):
            sample.optimizer.accumulate(part.real)
