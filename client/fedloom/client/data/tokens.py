"""Rows as token ids or pixels, and the padded tensors a model reads."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fedloom.client.data.rows import IGNORED, Indices, Rows
from fedloom.client.tasks.api import Ids, task_named
from fedloom.core.errors import ConfigError, DataError

__all__ = [
    "Encoded",
    "MediaReader",
    "Uniform",
    "attempted",
    "collate",
    "encode",
    "microbatches",
    "uniform_microbatches",
]

log = logging.getLogger(__name__)

_ROWS = 8
"""Measured: float32 sums of a transformer's rows are bit for bit the same in 8, 16, 24, ... rows of one length, on one
core and on two, and not in 1, 2 and 3."""

# Bounds the Python lists a tokenizer returns; the arrays that are kept are a tenth of their size.
_CHUNK = 1024


class MediaReader(Protocol):
    """How pictures, or recordings, become what a model reads."""

    def prepared(self, data: bytes, where: str) -> npt.NDArray[Any]:
        """What is kept of a file."""
        ...

    def inputs(self, prepared: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """The model's inputs, by name, of one shape for all; the first axis is the rows."""
        ...

    def drawn(self, generator: np.random.Generator) -> npt.NDArray[Any]:
        """Something made up, as `prepared` leaves it."""
        ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenized rows.

    Args:
        input_ids: One int32 array per sequence, with special tokens, truncated but not padded; none where rows are
            files. The sequences of a row lie together.
        labels: Shape (n, ...): what is learned of each row; not read when targets take its place.
        targets: For tasks with a target at each token, one int32 array per sequence, or `IGNORED` where there is none.
            Empty for other tasks.
        media: For pictures and recordings, what is kept of each row's file: pixels or samples.
        reader: For pictures and recordings, how these become what the model reads.
    """

    input_ids: tuple[Ids, ...]
    labels: Indices
    targets: tuple[Ids, ...] = ()
    media: tuple[npt.NDArray[Any], ...] = ()
    reader: MediaReader | None = None
    sequences: int = 1
    """Sequences of each row."""
    beside: bool = False
    """Targets go beside the labels and do not take their place."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    @property
    def evaluation_batch(self) -> int:
        """Rows in one forward pass of an evaluation: few where each token has its scores, a vocabulary of them."""
        return 8 if self.targets else 64

    def digest(self, index: int) -> bytes:
        """16 bytes that stand for what a model reads of a row: its tokens, or what is kept of its file."""
        parts = [*self.input_ids[self.own(index)], *self.media[index : index + 1]]
        # A recording is kept without the silence that its reader puts behind it.
        brought_to = np.array(getattr(self.reader, "length", 0), np.int64)
        return hashlib.blake2b(b"".join(part.tobytes() for part in (brought_to, *parts)), digest_size=16).digest()

    def length(self, index: int) -> int:
        """Tokens of the longest sequence of a row, or of what is written in answer to it; 0 of a picture."""
        own = self.own(index)
        return max((len(each) for part in (self.input_ids[own], self.targets[own]) for each in part), default=0)

    def own(self, index: int) -> slice:
        """Where the sequences of a row are."""
        return slice(index * self.sequences, (index + 1) * self.sequences)


def encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase | MediaReader, max_length: int, *, strict: bool = True
) -> Encoded:
    """Tokenize every row once, keeping at most `max_length` tokens of each, special tokens included.

    What is learned at each token is the task's to say, see `Task.encode`. Images and recordings are brought to their
    size.

    Args:
        rows: The rows.
        tokenizer: The model's.
        max_length: Tokens kept of a text.
        strict: False makes a single padding token, with nothing to learn, of a text that cannot be encoded: whether a
            text can be depends on the tokenizer that a run names, and an error would tell that there is such a text.

    Raises:
        DataError: A row gives no token, is no picture, or does not fit the chat template, and `strict`.
    """
    traits, reader, media = task_named(rows.task).traits, None, tuple[npt.NDArray[Any], ...]()
    if traits.media:
        reader = cast(MediaReader, tokenizer)
        media = tuple(reader.prepared(data, rows.place(index)) for index, data in enumerate(rows.images or rows.audio))
        if not traits.per_token:
            return Encoded((), rows.labels, media=media, reader=reader)
    encoded, faults = attempted(rows, cast(PreTrainedTokenizerBase, tokenizer), max_length)
    if faults:
        index, error = next(iter(faults.items()))
        found = f"{len(faults):,} of {len(rows):,} rows, the first at {rows.place(index)}: {error}"
        if strict:
            raise DataError(f"{found}. `fedloom data check` with --run counts all such rows")
        log.warning("nothing is learned of %s", found)
    idle = sum(bool((row == IGNORED).all()) for row in encoded.targets) - encoded.sequences * len(faults)
    if idle > 0:
        log.warning("%d of %d examples have nothing to learn within model.max_length", idle, len(rows))
    return replace(encoded, media=media, reader=reader)


def attempted(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Encoded, dict[int, DataError]]:
    """The rows as `encode` makes them when it is not strict, and why, for each that cannot be encoded, by its index."""
    traits, pairs, faults = task_named(rows.task).traits, list[_Pair](), dict[int, DataError]()
    rows_done = 0
    for start in range(0, len(rows), _CHUNK):
        chunk = rows.take(np.arange(start, min(start + _CHUNK, len(rows))))
        for row in _encoded(chunk, tokenizer, max_length):
            if isinstance(row, DataError):
                faults[rows_done] = row
                nothing = np.array([tokenizer.pad_token_id or 0], np.int32), np.array([IGNORED], np.int32)
                row = [nothing] * traits.sequences
            pairs += row
            rows_done += 1
    targets = tuple(targets for _, targets in pairs) if traits.per_token or traits.beside else ()
    ids = tuple(ids for ids, _ in pairs) if any(len(ids) for ids, _ in pairs) else ()
    return Encoded(ids, rows.labels, targets, sequences=traits.sequences, beside=traits.beside), faults


_Pair = tuple[Ids, Ids]
"""Ids and targets of a sequence."""


def _encoded(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[_Pair] | DataError]:
    """The sequences of each row, or what is wrong with it. Where they fail, halves are tried, until one row is."""
    task = task_named(rows.task)
    try:
        found = list(task.encode(rows, tokenizer, max_length))
    except Exception as error:
        if len(rows) == 1:
            fault = error if isinstance(error, DataError) else DataError(f"the tokenizer fails on it ({_kind(error)})")
            return [fault]
        middle = len(rows) // 2
        halves = (rows.take(np.arange(*bounds)) for bounds in ((0, middle), (middle, len(rows))))
        return [pair for half in halves for pair in _encoded(half, tokenizer, max_length)]
    none = DataError("it has no token under this model's tokenizer; remove or correct its text")
    size, media = task.traits.sequences, task.traits.media
    of_rows = [found[start : start + size] for start in range(0, len(found), size)]
    return [row if all(len(targets if media else ids) for ids, targets in row) else none for row in of_rows]


def _kind(error: Exception) -> str:
    """An error's kind alone: what it says may quote the row."""
    return type(error).__name__


def collate(encoded: Encoded, indices: Indices, pad_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """The model's inputs for the rows at `indices`, padded on the right to `length`, or to the longest among them.

    Padding on the right leaves every token at its own position whatever else is in the batch, and in a causal
    model no token looks at it.

    Returns:
        input_ids and attention_mask, int64, shape (len(indices), length), and labels, int64, of the same shape
        with `IGNORED` on padding, or of shape (len(indices), ...) when rows have labels of their own; beside these
        there may be targets. Where a row has several sequences, the inputs and targets have as many rows for it, one
        after the other. The mask is 1 on tokens and 0 on padding. Of pictures and recordings
        what their reader makes of them, float32, and labels.
    """
    longest, batch = length or max((encoded.length(i) for i in indices), default=0), dict[str, torch.Tensor]()
    if encoded.reader is not None:
        found = encoded.reader.inputs([encoded.media[i] for i in indices])
        batch = {name: torch.from_numpy(each) for name, each in found.items()}
    if encoded.input_ids:
        texts = [ids for i in indices for ids in encoded.input_ids[encoded.own(i)]]
        mask = _padded([np.ones(len(ids), np.int32) for ids in texts], 0, longest)
        batch |= {"input_ids": _padded(texts, pad_id, longest), "attention_mask": mask}
    if encoded.targets:
        targets = [each for i in indices for each in encoded.targets[encoded.own(i)]]
        batch["targets" if encoded.beside else "labels"] = _padded(targets, IGNORED, longest)
    return {"labels": torch.from_numpy(encoded.labels[indices]), **batch}


def _padded(rows: list[Ids], fill: int, length: int) -> torch.Tensor:
    """Shape (len(rows), length), int64."""
    table = np.full((len(rows), length), fill, np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table)


def microbatches(indices: Indices, encoded: Encoded, size: int) -> Iterator[Indices]:
    """Share one logical batch out into pieces of at most `size` rows of like length; none for an empty batch.

    Raises:
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"microbatch size {size} must be at least 1; raise train.microbatch")
    # Sorting keeps padding small and is safe for DP-SGD: the step is the sum of separately clipped per-example
    # gradients plus one noise draw, and a sum does not depend on the order or grouping of its terms.
    lengths = np.array([encoded.length(i) for i in indices], np.int64)
    ordered = indices[np.argsort(lengths, kind="stable")]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


class Uniform(NamedTuple):
    """A microbatch whose shape depends on no single row but for its own length."""

    rows: Indices
    """Indices; those after the first `real` repeat the last one, and must add nothing."""
    real: int
    length: int | None
    """Tokens to pad to; None of pictures."""


def uniform_microbatches(indices: Indices, encoded: Encoded, size: int, longest: int) -> Iterator[Uniform]:
    """Share one logical batch out so that a row is computed alike whatever other rows are in it.

    A kernel adds in an order that depends on the shape of what it is given. So the length that a row is padded to is a
    function of its own, the next power of two up to `longest`, and the number of rows is a multiple of eight, by
    repeating one, so that a row more or less changes no shape that another row's sums depend on. Where memory holds
    fewer than eight rows, it is always as many as it holds.

    Args:
        indices: Rows of the batch.
        encoded: All rows.
        size: Most rows in one microbatch, at least 1.
        longest: Most tokens of a row.
    """
    step = min(_ROWS, size)
    for length, rows in sorted(_by_length(indices, encoded, longest).items()):
        for start in range(0, len(rows), size // step * step):
            part = rows[start : start + size // step * step]
            yield Uniform(np.pad(part, (0, -len(part) % step), mode="edge"), len(part), length or None)


def _by_length(indices: Indices, encoded: Encoded, longest: int) -> dict[int, Indices]:
    """The rows by the length they are padded to; 0 of pictures."""
    if not (encoded.input_ids or encoded.targets):
        return {0: indices} if len(indices) else {}
    lengths = np.array([min(longest, max(8, 1 << (encoded.length(i) - 1).bit_length())) for i in indices], int)
    return {int(length): indices[lengths == length] for length in np.unique(lengths)}
