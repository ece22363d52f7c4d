"""Whether a base model can read what its run will give it, asked when it is loaded, before anything is charged."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.client.tasks.api import Task
from fedloom.core.errors import ModelError

__all__ = ["check_base"]

_SHORT = 32
"""Tokens after which a model whose positions are computed reads any number."""


def check_base(base: PreTrainedModel, reader: Any, task: Task, folder: Path) -> None:
    """Refuse a model that cannot do the task, or cannot read the longest text, a picture or a recording.

    Args:
        base: The model, on any device.
        reader: Its tokenizer, or what reads its pictures or recordings.
        task: What it is to do.
        folder: Where it lies, for errors.

    Raises:
        ModelError: As above; the message says what to change.
    """
    base.eval()
    if task.traits.media and not task.traits.per_token:
        _check_file(base, reader, task, folder)
        return
    if task.traits.media:
        _check_writing(base, reader, task, folder)
        return
    kind, traits = type(base).__name__, task.traits
    if base.config.is_encoder_decoder and not traits.decoder:
        # It scores a text where its end tokens are, which a text may hold itself: one row would end a run.
        raise ModelError(
            f"{kind} in {folder} is an encoder and a decoder; {type(task).__name__} takes a model that is one of them"
        )
    if traits.decoder and not base.config.is_encoder_decoder:
        raise ModelError(f"{kind} in {folder} has no decoder beside an encoder; take a model such as T5 or BART")
    if traits.generates and not traits.decoder and not _causal(base):
        raise ModelError(f"{kind} in {folder} sees the tokens it is to predict; take a language model")
    if traits.chat and not reader.chat_template:
        raise ModelError(f"the tokenizer in {folder} has no chat template; take an instruct model, or task causal-lm")
    known = base.get_input_embeddings().weight.shape[0]
    if len(reader) > known:
        # A text with such a token would end a run half-way, which tells that it is there.
        raise ModelError(f"the tokenizer in {folder} has {len(reader)} tokens, the model {known}; get files that fit")
    _check_length(base, reader, folder, task)


def _check_length(base: PreTrainedModel, reader: PreTrainedTokenizerBase, folder: Path, task: Task) -> None:
    """Have the model read a short text beside one of `max_length` tokens."""
    max_length = task.max_length
    tables = [name.rpartition(".")[2] for name, each in base.named_modules() if isinstance(each, nn.Embedding)]
    learned = any("pos" in name or name == "wpe" for name in tables)
    longest = max_length if learned else min(max_length, _SHORT)
    if (error := _unreadable(base, reader, task, longest)) is None:
        return
    kind = type(base).__name__
    if _unreadable(base, reader, task, 8) is not None:
        raise ModelError(f"{kind} in {folder} cannot score a batch of texts: {error}; take another model") from error
    works, fails = 8, longest
    while fails - works > 1:
        middle = (works + fails) // 2
        works, fails = (middle, fails) if _unreadable(base, reader, task, middle) is None else (works, middle)
    raise ModelError(
        f"{kind} in {folder} reads texts of at most {works} tokens; model.max_length = {max_length} is too long; set "
        f"model.max_length = {works}"
    ) from error


def _unreadable(base: PreTrainedModel, reader: PreTrainedTokenizerBase, task: Task, length: int) -> Exception | None:
    """What comes of a text of two tokens beside one of `length`."""
    token = next(each for each in reversed(range(len(reader))) if each not in reader.all_special_ids)
    ids = torch.full((2, length), token, device=base.device)
    ids[0, 2:] = int(reader.pad_token_id or 0)
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    try:
        with torch.no_grad():
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            task.scores(base, batch | {"targets": ids} if task.traits.beside else batch)
    except Exception as error:  # whatever another's code raises
        return error
    return None


def _check_file(base: PreTrainedModel, reader: Any, task: Task, folder: Path) -> None:
    """Have the model read a made-up picture or recording."""
    features = reader.inputs([reader.drawn(np.random.default_rng(0))])
    try:
        with torch.no_grad():
            task.scores(base, {name: torch.from_numpy(each).to(base.device) for name, each in features.items()})
    except (RuntimeError, ValueError, TypeError) as error:
        if task.traits.images:
            what = f"colour pictures of {reader.side} by {reader.side} pixels; remove model.image_size"
        else:
            what = f"recordings of {reader.seconds:g} s as its preprocessor_config.json makes them; get files that fit"
        raise ModelError(
            f"{type(base).__name__} in {folder} cannot read {what}, or take another model ({error})"
        ) from error


def _check_writing(base: PreTrainedModel, reader: Any, task: Task, folder: Path) -> None:
    """Have the model write `task.max_length` tokens about a made-up picture or recording."""
    before = reader.prefix if task.traits.images else np.zeros(0, np.int32)
    if len(before) + 2 > task.max_length:
        raise ModelError(
            f"a picture takes {len(before)} places of a text in {folder}; model.max_length = {task.max_length} leaves "
            f"no room for the text itself; set it to {len(before) + 32} or more"
        )
    features = reader.inputs([reader.drawn(np.random.default_rng(0))])
    batch = {name: torch.from_numpy(each).to(base.device) for name, each in features.items()}
    ids = np.concatenate([before, np.zeros(task.max_length - len(before), np.int32)])[None]
    batch["labels"] = torch.from_numpy(ids).long().to(base.device)
    if task.traits.images:
        batch |= {"input_ids": batch["labels"], "attention_mask": torch.ones_like(batch["labels"])}
    try:
        with torch.no_grad():
            task.scores(base, batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"{type(base).__name__} in {folder} cannot write {task.max_length} tokens, which is "
            f"model.max_length; lower it, or take another model ({error})"
        ) from error


def _causal(base: PreTrainedModel) -> bool:
    """Whether the scores at a token are a function of it and the tokens before it."""
    ids = torch.arange(4, device=base.device).expand(2, -1).clone()
    ids[1, -1] += 1
    with torch.no_grad():
        first, second = base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4)
