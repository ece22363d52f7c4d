"""A check of the promise that DP-SGD rests on, made at start-up on the user's own model and loss.

The noise covers one example's influence only if that influence on the clipped sum is at most C. A loss divided by
a count over the batch, batch normalisation, a layer that mixes examples or a trained parameter that nobody clips
break this without any error. So before a private run a few examples go through the training path, alone, together,
with one more and with one replaced, and what must not move is compared.

The examples are made up from random token ids and labels. The private data is not touched, so that whether the
probe passes tells nothing about it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fedloom.client.data.rows import IGNORED, Indices
from fedloom.client.data.tokens import Encoded, collate, uniform_microbatches
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.tasks.api import Ids
from fedloom.client.training.device import free_bytes
from fedloom.core.errors import ModelError

__all__ = ["BatchLoss", "made_up", "probe"]

BatchLoss = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""The sum of per-example losses of a collated batch, with its graph: what training calls `backward` on."""

_LENGTHS = (3, 7, 17, 20)
"""Two and two that are padded to one length, so that each has another one beside it."""

_LONGEST = 128
"""Tokens of the longest example that gradients are computed of; a batch of a few at a language model's full length
might not fit where training works with one at a time."""

_TOGETHER = (0, 1, 2, 3)
_NEIGHBOURS = {
    "with an example replaced by one of the same length": (0, 1, 2, 4),
    "with a long example added": (0, 1, 2, 3, 5),
    "with a short example added": (0, 1, 2, 3, 6),
    "with a short example replaced by a long one": (5, 1, 2, 3),
    "with a long example replaced by a short one": (0, 1, 2, 6),
}
"""Batches of made-up examples, by number, that differ from `_TOGETHER` in one example."""

_REMEDY = (
    "so the noise would not cover one example's influence; use a loss that is a sum of per-example losses and a base "
    "model whose layers do not mix the examples of a batch, or train other layers"
)


@dataclass(frozen=True)
class _Tolerance:
    """Relative differences taken for rounding."""

    padding: float
    """Between the gradient of an example alone and as it is trained: padded, and among others."""
    neighbour: float
    """Between gradients of one example trained among others and among neighbours of those: its shape is its own, so the
    same operations see the same numbers."""


_FLOAT32 = _Tolerance(padding=1e-2, neighbour=1e-4)
_HALF = _Tolerance(padding=0.3, neighbour=1e-2)
"""For a base model in half precision. Tiny random models of float32 differ by 2e-4 between paddings, of bfloat16 by
0.15, deep ones by more than the gradient is long; a mean over the tokens of these made-up examples by 0.9. So paddings
are compared in float32 wherever there is room for it, and neighbours, which meet the same operations, as they train."""

_BOUND = 1e-4
"""Relative slack of the clipping bound."""


def probe(model: AdapterModel, loss: BatchLoss, max_length: int) -> None:
    """Refuse a model and loss under which one example could move the clipped sum by more than the bound.

    Checked, on a random adapter and on everything the adapter's schema can train:

    - each example's recorded gradient is the one autograd gives for the example alone, in float32 if memory allows it;
    - adding or replacing an example leaves the recorded gradients of the others as they are;
    - the clipped sum moves by at most C when an example is added and by 2 C when one is replaced, for a C that
      clips them all;
    - no other parameter is trained, and training changes no buffer;
    - the adapter's kind does not say itself that it is not for private runs;
    - a text of `max_length` tokens goes through, since one that does not would end a run when it is sampled.

    The model is left as it was, and one that has passed is not probed again. Takes fourteen passes over one to five
    examples of at most 128 tokens.

    Raises:
        ModelError: Says which of these failed, by how much, and what to do.
    """
    if model.probed:
        return
    if not model.adapter.traits.private:
        raise ModelError(f"{type(model.adapter).__name__} is not for private runs; choose another adapter.kind")
    longest = min(_LONGEST + len(_before(model)), max_length)
    with _random_adapter(model) as parameters:
        try:
            _read_longest(model, loss, max_length)
            _compare(_Bench(model, parameters, loss, made_up(model, longest), longest))
        except (IndexError, RuntimeError, ValueError) as error:
            raise ModelError(f"the sensitivity probe cannot run this model on made-up examples: {error}") from error
    model.probed = True


def made_up(model: AdapterModel, longest: int) -> Encoded:
    """Seven examples of random tokens and labels: four lengths, one of equal length, a long one and a short one.

    The long one has `longest` tokens, at least 2; all are at most as long. Some tokens are without a label. Pictures
    have one size, and random pixels.
    """
    rng, task, count = np.random.default_rng(0), model.task, len(_LENGTHS) + 3
    if task.traits.media and not task.traits.per_token:
        media = tuple(model.tokenizer.drawn(rng) for _ in range(count))
        return Encoded((), task.draw(rng, count, model.model.config.num_labels), media=media, reader=model.tokenizer)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    # A padding token within a text would be taken for the text's end by models that look for it.
    usable = np.setdiff1d(np.arange(vocabulary), model.tokenizer.all_special_ids)
    config = model.model.config
    classes = vocabulary if task.traits.generates else config.num_labels
    if task.traits.headless:
        classes = config.hidden_size  # outputs of the base model itself
    before = _before(model)
    room = longest - len(before)
    lengths = [min(length, room) for length in (*_LENGTHS, _LENGTHS[-1], room, 2)]
    each = np.repeat(lengths, task.traits.sequences)
    input_ids = tuple(rng.choice(usable, length).astype(np.int32) for length in each)
    labels, targets = task.draw(rng, len(lengths), classes), tuple[Ids, ...]()
    if task.traits.beside:
        targets = tuple(np.append(ids[1:], IGNORED).astype(np.int32) for ids in input_ids)
    elif task.traits.per_token:
        targets = tuple(task.draw(rng, length, classes).astype(np.int32) for length in each)
        labels = np.zeros_like(labels)
    for row in targets:
        row[int(task.traits.beside) :: 3] = IGNORED
    found = Encoded(input_ids, labels, targets, sequences=task.traits.sequences, beside=task.traits.beside)
    if task.traits.media:
        media = tuple(model.tokenizer.drawn(rng) for _ in range(count))
        found = replace(found, input_ids=(), media=media, reader=model.tokenizer)
    if len(before):
        input_ids = tuple(np.concatenate([before, ids]) for ids in input_ids)
        targets = tuple(np.concatenate([np.full(len(before), IGNORED, np.int32), each]) for each in targets)
        found = replace(found, input_ids=input_ids, targets=targets)
    # By the model as it is: beside a base model that a random adapter is far from, some losses are flat.
    return task.prepare(model, found)


def _before(model: AdapterModel) -> Ids:
    """The places that a picture takes in a text."""
    traits = model.task.traits
    return np.asarray(model.tokenizer.prefix if traits.images and traits.per_token else (), np.int32)


@contextmanager
def _random_adapter(model: AdapterModel) -> Iterator[list[nn.Parameter]]:
    """The adapter's parameters at random values, so that every one of them has a gradient; then as they were."""
    slots = list(model.slots.values())
    before = [(slot.parameter.detach().clone(), slot.parameter.requires_grad) for slot in slots]
    rng = np.random.default_rng(1)
    parameters = model.trainable(model.schema.roles)
    try:
        with torch.no_grad():
            for parameter in parameters:
                drawn = rng.standard_normal(tuple(parameter.shape)) * parameter.shape[-1] ** -0.5
                parameter.add_(torch.from_numpy(drawn).to(parameter))
        yield parameters
    finally:
        with torch.no_grad():
            for slot, (value, trained) in zip(slots, before, strict=True):
                slot.parameter.copy_(value)
                slot.parameter.requires_grad_(trained)
                slot.parameter.grad = None


def _read_longest(model: AdapterModel, loss: BatchLoss, max_length: int) -> None:
    if model.task.traits.media and not model.task.traits.per_token:
        return  # images have one size, which loading the model has tried
    longest = made_up(model, max_length)
    number = max(range(len(longest)), key=longest.length)
    try:
        with torch.no_grad():
            loss(collate(longest, np.array([number]), model.tokenizer.pad_token_id))
    except (IndexError, RuntimeError, ValueError) as error:
        raise ModelError(f"the model cannot read model.max_length = {max_length} tokens; lower it ({error})") from error


@dataclass(frozen=True)
class _Bench:
    """What goes through the training path."""

    model: AdapterModel
    parameters: list[nn.Parameter]
    loss: BatchLoss
    examples: Encoded
    longest: int
    """Tokens of the longest example."""

    def batch(self, chosen: Indices, length: int | None = None) -> dict[str, torch.Tensor]:
        return collate(self.examples, chosen, self.model.tokenizer.pad_token_id, length)

    def alone(self, number: int) -> torch.Tensor:
        """The gradient of one example in a batch of its own, by plain autograd; shape (P,)."""
        found = torch.autograd.grad(self.loss(self.batch(np.array([number]))), self.parameters, allow_unused=True)
        pairs = zip(self.parameters, found, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).float() for p, g in pairs])

    def recorded(self, chosen: Sequence[int], bound: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-example gradients, shape (len(chosen), P), and their clipped sum, shape (P,), as training gets them."""
        whole = self.model.model
        buffers = {name: buffer.clone() for name, buffer in whole.named_buffers()}
        with recording(whole, self.parameters) as tape:
            optimizer = PrivateOptimizer(
                torch.optim.SGD(self.parameters),
                tape,
                Seeded(0),
                noise_multiplier=0.0,
                clip_norm=bound,
                expected_batch=1.0,
            )
            gradients = torch.zeros(len(chosen), tape.width, device=self.model.device)
            places = {number: place for place, number in enumerate(chosen)}
            for part in uniform_microbatches(np.array(chosen, np.int64), self.examples, len(chosen) + 8, self.longest):
                tape.begin(len(part.rows), self.examples.sequences)
                torch.autograd.backward(self.loss(self.batch(part.rows, part.length)))
                tape.finish()
                for row in range(part.real):
                    gradients[places[int(part.rows[row])]] = tape.flat[row]
                optimizer.accumulate(part.real)
            total = optimizer.clipped_sum
            optimizer.zero_grad(set_to_none=True)
        if changed := [name for name, buffer in whole.named_buffers() if not torch.equal(buffer, buffers[name])]:
            raise ModelError(
                f"sensitivity probe: reading a batch changes {changed[0]}, which carries what it saw into later steps; "
                "use a base model without running statistics"
            )
        return gradients, total


def _compare(bench: _Bench) -> None:
    taped = set(bench.parameters)
    if loose := [n for n, p in bench.model.model.named_parameters() if p.requires_grad and p not in taped]:
        raise ModelError(
            f"sensitivity probe: {len(loose)} trained parameters such as {loose[0]} are not part of the adapter, so "
            "nobody clips their gradients; freeze them"
        )
    with _in_float32(bench.model) as changed:
        alone = torch.stack([bench.alone(number) for number in range(len(bench.examples))])
        norms = torch.linalg.vector_norm(alone, dim=1)
        # A bound that clips no one would not show a clip that does nothing.
        bound = 0.5 * float(norms.min())
        if not 0 < bound < math.inf:
            raise ModelError(
                f"sensitivity probe: an example alone has a gradient of norm {2 * bound:g}; use a loss that does not "
                "compare the examples of a batch, and check the base model's weights"
            )
        together, its_sum = bench.recorded(_TOGETHER, bound)
        whole = list(_TOGETHER)
        own = _difference(together, alone[whole], norms[whole])
        exact = all(parameter.dtype == torch.float32 for parameter in bench.model.model.parameters())
    what = "in a batch, an example's gradient is not the one it has alone"
    if not exact:
        what += ' (rounding alone can do that in half precision: compute.dtype = "float32" would tell)'
    _refuse_above((_FLOAT32 if exact else _HALF).padding, own, what)
    tolerance = _FLOAT32 if exact and not changed else _HALF
    if changed:
        together, its_sum = bench.recorded(_TOGETHER, bound)
    for name, chosen in _NEIGHBOURS.items():
        gradients, total = bench.recorded(chosen, bound)
        kept = [place for place, number in enumerate(_TOGETHER) if chosen[place] == number]
        found = _difference(gradients[kept], together[kept], norms[kept])
        _refuse_above(tolerance.neighbour, found, f"{name}, the gradient of another one changes")
        moved = float(torch.linalg.vector_norm(total - its_sum)) / bound
        # Rounding moves the others too, by no more than was just allowed.
        most = (1 if len(chosen) > len(_TOGETHER) else 2) * (1 + _BOUND) + len(kept) * found
        _refuse_above(most, moved, f"{name}, the clipped sum moves too far, in units of C")


@contextmanager
def _in_float32(model: AdapterModel) -> Iterator[bool]:
    """The frozen parameters of half precision in float32, if all can be and memory has room; whether they are.

    The way to float32 and back changes no value.
    """
    halves = [each for each in model.model.parameters() if each.dtype in (torch.bfloat16, torch.float16)]
    frozen = all(each.is_floating_point() for each in model.model.parameters())
    free = free_bytes(model.device, None)
    extra = 2 * sum(each.numel() for each in halves)
    if not halves or not frozen or free is None or extra > free // 2:
        yield False
        return
    before = [each.dtype for each in halves]
    for each in halves:
        each.data = each.data.float()
    try:
        yield True
    finally:
        for each, dtype in zip(halves, before, strict=True):
            each.data = each.data.to(dtype)


def _difference(one: torch.Tensor, other: torch.Tensor, norms: torch.Tensor) -> float:
    """Largest distance of two rows, relative to the norms of the examples' gradients."""
    return float((torch.linalg.vector_norm(one - other, dim=1) / norms).max())


def _refuse_above(most: float, found: float, what: str) -> None:
    if not found <= most:  # a NaN is refused too
        raise ModelError(f"sensitivity probe: {what} ({found:.3g}; at most {most:.3g} is allowed), {_REMEDY}")
