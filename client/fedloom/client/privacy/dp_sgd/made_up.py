"""Examples of random tokens, pictures or recordings, for checks and plans that must not touch private data."""

from dataclasses import replace
from typing import Any

import numpy as np

from fedloom.client.data.rows import IGNORED
from fedloom.client.data.tokens import Encoded
from fedloom.client.tasks.api import Ids, Task

__all__ = ["made_up_rows", "places_before"]

_LENGTHS = (3, 7, 17, 20)
"""Two and two that are padded to one length, so that each has another one beside it."""


def made_up_rows(task: Task, reader: Any, model: Any, longest: int) -> Encoded:
    """Seven examples of random tokens and labels: four lengths, one of equal length, a long one and a short one.

    The long one has `longest` tokens, at least 2; all are at most as long. Some tokens are without a label. Pictures
    have one size, and random pixels.

    Args:
        task: Of a run.
        reader: The model's tokenizer, or how it reads pictures or recordings.
        model: A model of transformers. It is asked for the sizes of its vocabulary and its outputs alone, so that its
            weights may be anywhere.
        longest: Tokens.
    """
    rng, count = np.random.default_rng(0), len(_LENGTHS) + 3
    if task.traits.media and not task.traits.per_token:
        media = tuple(reader.drawn(rng) for _ in range(count))
        return Encoded((), task.draw(rng, count, model.config.num_labels), media=media, reader=reader)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # A padding token within a text would be taken for the text's end by models that look for it.
    usable = np.setdiff1d(np.arange(vocabulary), reader.all_special_ids)
    classes = vocabulary if task.traits.generates else model.config.num_labels
    if task.traits.headless:
        classes = model.config.hidden_size  # outputs of the base model itself
    before = places_before(task, reader)
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
        found = replace(found, input_ids=(), media=tuple(reader.drawn(rng) for _ in range(count)), reader=reader)
    if len(before):
        input_ids = tuple(np.concatenate([before, ids]) for ids in input_ids)
        targets = tuple(np.concatenate([np.full(len(before), IGNORED, np.int32), each]) for each in targets)
        found = replace(found, input_ids=input_ids, targets=targets)
    return found


def places_before(task: Task, reader: Any) -> Ids:
    """The places that a picture takes in a text."""
    seen = task.traits.images and task.traits.per_token
    return np.asarray(reader.prefix if seen else (), np.int32)
