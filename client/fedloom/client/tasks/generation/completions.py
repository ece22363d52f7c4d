"""What follows a prompt, token by token, and how likely a language model finds it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.client.data.rows import IGNORED
from fedloom.client.tasks.api import Ids

if TYPE_CHECKING:
    import torch

__all__ = ["completion_tokens", "log_likelihood"]


def completion_tokens(
    texts: Sequence[str], prompts: Sequence[str], tokenizer: Any, max_length: int, *, special: bool = True
) -> Iterator[tuple[Ids, Ids]]:
    """Ids of each text, and the next token's id at each token before one that reaches beyond the prompt.

    Args:
        texts: Whole texts, each beginning with its prompt.
        prompts: What is read but not learned; "" learns the whole text.
        tokenizer: The model's.
        max_length: Tokens to keep of each.
        special: Begin as the tokenizer begins a text.
    """
    # Cut here rather than by the tokenizer, which would put its end token where a text does not end.
    given: dict[str, Any] = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    output = tokenizer(list(texts), add_special_tokens=special, **given)
    end = tokenizer.eos_token_id
    for whole, spans, prompt in zip(output["input_ids"], output["offset_mapping"], prompts, strict=True):
        # A special token spans no character, so the one that begins a text is never learned.
        learned = [stop > start and stop > len(prompt) for start, stop in spans]
        if end is not None:
            bare = len(whole) - (whole[-1:] == [end])
            whole, learned = [*whole[:bare], end], [*learned[:bare], True]
        ids = np.asarray(whole[:max_length], np.int32)
        targets = np.full(len(ids), IGNORED, np.int32)
        targets[:-1] = np.where(learned[1 : len(ids)], ids[1:], IGNORED)
        yield ids, targets


def log_likelihood(scores: "torch.Tensor", targets: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Sum of the log-probabilities of each row's targets in nats, and how many there are, both of shape (rows,).

    Args:
        scores: Logits, shape (rows, length, vocabulary).
        targets: Shape (rows, length); `IGNORED` where nothing is to be predicted.
    """
    from torch.nn import functional as F

    each = F.cross_entropy(scores.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -each.view_as(targets).sum(1), (targets != IGNORED).sum(1)
