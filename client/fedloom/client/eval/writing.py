"""What a model writes in answer to held-out rows, and how near that is to what was wanted."""

from collections.abc import Iterator, Sequence, Set
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom.client.data.rows import IGNORED
from fedloom.client.data.tokens import Encoded
from fedloom.client.eval.text_figures import Written
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.loading_context import quiet
from fedloom.client.tasks.api import Ids
from fedloom.client.training.device import on_device
from fedloom.core.errors import DataError

__all__ = ["written"]

_BATCH = 8


class _Order(NamedTuple):
    """One row that something is to be written for."""

    row: int
    prompt: Ids
    """What the part of the model that writes has read before its first token."""
    wanted: Ids


def written(model: AdapterModel, encoded: Encoded, count: int) -> list[Written]:
    """Have the model write, greedily, the answer of each of the first `count` rows that ask for one.

    Of a conversation that is the assistant's last turn. A model reads and writes at most `max_length` tokens of its
    task, so that both texts end there.

    Args:
        model: Base model and adapter, of a task that writes.
        encoded: Rows, at least one of which has a prompt, or something else that is read.
        count: Rows.

    Returns:
        As many texts, or fewer where fewer rows ask for one, in the order of the rows.

    Raises:
        DataError: No row asks for anything.
    """
    base, tokenizer, most = _plain(model.model), model.tokenizer, model.task.max_length
    orders = list(islice(_orders(model, encoded), count))
    if not orders:
        raise DataError(
            "evaluation.generate has the model write what follows a prompt, but no held-out row has one; give the rows "
            "the columns prompt and completion, or remove evaluation.generate"
        )
    found: dict[int, Ids] = {}
    with torch.inference_mode():
        for batch in _batches(orders, model.task.traits.decoder):
            longest = most - min(len(order.prompt) for order in batch)
            ids = _generated(model, base, encoded, batch, max(1, longest))
            for order, own in zip(batch, ids, strict=True):
                found[order.row] = own[: max(1, most - len(order.prompt))]
    return [
        Written(*(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (order.wanted, found[order.row])))
        for order in orders
    ]


def _plain(model: Any) -> Any:
    """The model of transformers, with an adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _orders(model: AdapterModel, encoded: Encoded) -> Iterator[_Order]:
    special = _special(model.tokenizer) - {model.tokenizer.eos_token_id}
    for row, targets in enumerate(encoded.targets):
        if model.task.traits.decoder:
            given = _given(targets, special)
            start = np.array([_plain(model.model).config.decoder_start_token_id], np.int32)
            yield _Order(row, np.concatenate([start, targets[:given]]), targets[given:])
            continue
        learned = np.flatnonzero(targets != IGNORED)
        if len(learned) == 0:
            continue
        # The last run of learned places: of a conversation the last answer.
        begin = int(learned[np.flatnonzero(np.diff(learned, prepend=-2) > 1)[-1]])
        if begin:  # otherwise there is no prompt: the whole text is learned
            yield _Order(row, encoded.input_ids[row][: begin + 1], targets[begin : learned[-1] + 1])


def _given(targets: Ids, special: Set[int]) -> int:
    """How many special tokens the tokenizer writes before a text, such as its language: they are given."""
    return next((place for place, each in enumerate(targets.tolist()) if each not in special), len(targets))


def _special(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text: those with a role, and others such as Whisper's <|en|>."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(place for place, token in added.items() if token.special)}


def _batches(orders: Sequence[_Order], decoder: bool) -> Iterator[list[_Order]]:
    """Rows that can be written together, those of like length beside each other."""
    ordered = sorted(orders, key=lambda order: (len(order.prompt), order.prompt.tolist() if decoder else []))
    # What a decoder begins with has no mask, so that it must be as long in all rows of a batch.
    for _, part in groupby(ordered, key=lambda order: len(order.prompt) if decoder else 0):
        rows = list(part)
        yield from (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))


def _generated(model: AdapterModel, base: Any, encoded: Encoded, batch: list[_Order], most: int) -> list[Ids]:
    """The new tokens of each row, without the one that ends them and what follows it."""
    from transformers import GenerationConfig, GenerationMixin

    inputs: dict[str, torch.Tensor] = {}
    if encoded.reader is not None:
        values = encoded.reader.inputs([encoded.media[order.row] for order in batch])
        inputs = {name: torch.from_numpy(each) for name, each in values.items()}
    pad = model.tokenizer.pad_token_id
    # On the left, so that all end where what is written begins.
    prompts, mask = _padded([order.prompt for order in batch], pad, left=True)
    if not model.task.traits.decoder:
        inputs |= {"input_ids": prompts, "attention_mask": mask}
    elif encoded.input_ids:
        read, known = _padded([encoded.input_ids[order.row] for order in batch], pad, left=False)
        inputs |= {"decoder_input_ids": prompts, "input_ids": read, "attention_mask": known}
    else:
        inputs["decoder_input_ids"] = prompts
    ends = _ends(base, model.tokenizer, batch)
    wanted = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        eos_token_id=sorted(ends),
        pad_token_id=model.tokenizer.pad_token_id,
        use_cache=True,
    )
    on_place = {name: on_device(each, model.device) for name, each in inputs.items()}
    # Not the model's own method: Whisper's is for long recordings, and looks for times in what it writes.
    with quiet():  # it tells which of the model's own settings these take the place of
        ids = GenerationMixin.generate(base, generation_config=wanted, **on_place).cpu().numpy()
    new = ids[:, prompts.shape[1] :]
    stops = (next((place for place, each in enumerate(row.tolist()) if each in ends), len(row)) for row in new)
    return [row[:stop] for row, stop in zip(new, stops, strict=True)]


def _ends(base: Any, tokenizer: Any, batch: list[_Order]) -> set[int]:
    """Tokens that end what is written: the model's, the tokenizer's, and a special one that ends the rows' texts."""
    own = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])} - {None}
    special = _special(tokenizer)
    return found | {int(order.wanted[-1]) for order in batch if len(order.wanted) and order.wanted[-1] in special}


def _padded(rows: list[Ids], fill: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64, shape (rows, longest)."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), fill, np.int64), np.zeros((len(rows), longest), np.int64)
    for line, known, row in zip(ids, mask, rows, strict=True):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        line[place], known[place] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
