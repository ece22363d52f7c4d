"""Texts as token ids, and the padded tensors a model reads."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.rows import Indices, Rows
from fedloom.proto.errors import ConfigError

__all__ = ["Encoded", "collate", "encode", "microbatches"]

# Bounds the Python lists a tokenizer returns; the arrays that are kept are a tenth of their size.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenized rows.

    Args:
        input_ids: One int32 array per row, with special tokens, truncated but not padded.
        labels: int64, shape (n,).
    """

    input_ids: tuple[npt.NDArray[np.int32], ...]
    labels: Indices

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenize every row once, keeping at most `max_length` tokens of each, special tokens included."""
    input_ids: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = list(rows.texts[start : start + _CHUNK])
        output = tokenizer(chunk, truncation=True, max_length=max_length, return_attention_mask=False)
        input_ids += [np.asarray(ids, np.int32) for ids in output["input_ids"]]
    return Encoded(tuple(input_ids), rows.labels)


def collate(encoded: Encoded, indices: Indices, pad_id: int) -> dict[str, torch.Tensor]:
    """The model's inputs for the rows at `indices`, padded to the longest among them.

    Returns:
        input_ids and attention_mask, int64, shape (len(indices), longest), and labels, int64,
        shape (len(indices),). The mask is 1 on tokens and 0 on padding.
    """
    texts = [encoded.input_ids[i] for i in indices]
    longest = max(map(len, texts), default=0)
    input_ids = np.full((len(texts), longest), pad_id, np.int64)
    mask = np.zeros((len(texts), longest), np.int64)
    for row, ids in enumerate(texts):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(encoded.labels[indices].astype(np.int64)),
    }


def microbatches(indices: Indices, encoded: Encoded, size: int) -> Iterator[Indices]:
    """Share one logical batch out into pieces of at most `size` rows of like length; none for an empty batch.

    Raises:
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"microbatch size {size} must be at least 1; raise train.microbatch")
    # Sorting keeps padding small and is safe for DP-SGD: the step is the sum of separately clipped per-example
    # gradients plus one noise draw, and a sum does not depend on the order or grouping of its terms.
    lengths = np.array([len(encoded.input_ids[i]) for i in indices], np.int64)
    ordered = indices[np.argsort(lengths, kind="stable")]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
