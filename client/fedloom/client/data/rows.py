"""Private or held-out examples in memory, and the identity of a data set."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedloom.client.data.labels import Labelling
from fedloom.client.data.records import Turns
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Answers
from fedloom.core.errors import DataError

__all__ = ["IGNORED", "Indices", "Rows", "digest", "documents", "picture", "pooled", "recording_path"]

IGNORED = -100
"""Label of a position that has none, as torch's cross-entropy names it."""

_COLUMNS = ("words", "tags", "prompts", "turns", "images", "audio", "parts")
"""Columns that some tasks have."""

Indices = npt.NDArray[np.int64]

T = TypeVar("T")

_BY_ROW = ("texts", "groups", *_COLUMNS, "places")


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples of one task, in a fixed order.

    Args:
        texts: n texts, each the whole content of its row: of token-classification the words joined by spaces, of
            causal-lm the prompt and what follows it, of instruct all turns one after the other; of a picture or a
            recording its fingerprint.
        labels: int64, shape (n,): position of each row's label in `label_names`; all zeros of tasks whose rows have
            no label of their own. Of other tasks numbers, or several for each row, shape (n, ...).
        groups: n names of the silo a row belongs to; "" when it has none.
        label_names: The classes, in the order of the model's outputs; none for language models.
        task: What the rows are for.
        words: For token-classification, n tuples of words.
        tags: For token-classification, n int64 arrays: position of each word's label in `label_names`, `IGNORED` of a
            word that has none and is neither learned nor scored.
        prompts: For causal-lm, n beginnings of the texts that are read but not learned; "" learns the whole text.
        turns: For instruct, n conversations: role and content of each turn.
        images: For image-classification, n pictures as the bytes of their files.
        audio: For speech-recognition, n recordings likewise.
        parts: For tasks whose rows have several texts, such as a question and an answer, n tuples of them.
        places: Where each row was read, n file names and line numbers; none of rows that were read nowhere.
        answers: For instruct, which of the assistant's turns are learned.
        labelling: How the labels were read, if they were.

    Raises:
        DataError: The lengths differ or a label is out of range.
    """

    texts: tuple[str, ...]
    labels: Indices
    groups: tuple[str, ...]
    label_names: tuple[str, ...]
    task: str = "text-classification"
    words: tuple[tuple[str, ...], ...] = ()
    tags: tuple[Indices, ...] = ()
    prompts: tuple[str, ...] = ()
    turns: tuple[Turns, ...] = ()
    images: tuple[bytes, ...] = ()
    audio: tuple[bytes, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()
    places: tuple[str, ...] = ()
    answers: Answers = "all"
    labelling: Labelling | None = None

    def __post_init__(self) -> None:
        """Refuse columns that do not belong together."""
        count = len(self.texts)
        if self.labels.shape[:1] != (count,) or len(self.groups) != count:
            raise DataError(
                f"{count} texts with labels of shape {self.labels.shape} and {len(self.groups)} groups; "
                "every row needs one text, one label and one group"
            )
        held = task_named(self.task).traits.holds
        for column in _COLUMNS:
            wanted, found = (count if column in held else 0), len(getattr(self, column))
            if found != wanted:
                raise DataError(f"{found} {column} for {count} texts of {self.task}; {wanted} are needed")
        if self.prompts and not all(map(str.startswith, self.texts, self.prompts)):
            raise DataError("every text must begin with its prompt; one does not")
        if self.tags:
            self._check_tags()
        elif "tags" not in held and self.label_names:
            _check_range(self.labels, self.label_names)

    def _check_tags(self) -> None:
        if [len(words) for words in self.words] != [len(tags) for tags in self.tags]:
            raise DataError("words and tags of a row differ in number; every word needs one tag")
        tags = np.concatenate(self.tags)
        _check_range(tags[tags != IGNORED], self.label_names)

    @property
    def kinds(self) -> Indices:
        """One label for each row, shape (n,), where rows are told apart by it: of several labels the set of them."""
        if self.labels.ndim == 1:
            return self.labels
        sets: Indices = np.unique(self.labels.reshape(len(self), -1), axis=0, return_inverse=True)[1].reshape(-1)
        return sets

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    def take(self, indices: Indices) -> "Rows":
        """The rows at `indices`, in that order.

        Raises:
            IndexError: An index is out of range.
        """
        columns: dict[str, Any] = {name: _taken(getattr(self, name), indices) for name in _BY_ROW}
        return replace(self, labels=self.labels[indices], **columns)

    def place(self, index: int) -> str:
        """Where a row was read, or which one it is, counted from 1."""
        return self.places[index] if self.places else f"example {index + 1}"


def pooled(parts: Sequence[Rows]) -> Rows:
    """The rows of several data sets of one task and the same label names, one after the other.

    Args:
        parts: At least one; all read the same label names and answers.
    """
    first = parts[0]

    def column(name: str) -> Any:
        return tuple(chain.from_iterable(getattr(part, name) for part in parts))

    return replace(
        first,
        labels=np.concatenate([part.labels for part in parts]),
        **{name: column(name) for name in _BY_ROW},
    )


def _taken(column: tuple[T, ...], indices: Indices) -> tuple[T, ...]:
    """The entries at `indices` of a column, which is empty when the task has no such column."""
    return tuple(column[i] for i in indices) if column else ()


def _check_range(labels: Indices, names: tuple[str, ...]) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}; "
            f"0 to {len(names) - 1} are allowed, one for each label name"
        )


def digest(rows: Rows) -> str:
    """SHA-256 of the texts as a multiset, 64 hex digits: the identity under which privacy loss is accounted.

    It depends neither on the order of the rows nor on labels, tags, prompts or groups. Label names come from the
    run file, so a coordinator that could change the digest through them would get a fresh privacy budget for the
    same people's texts. For the same reason `load_rows` refuses a row that holds the contents of two tasks.

    >>> a = Rows(("good", "bad"), np.array([1, 0]), ("", ""), ("negative", "positive"))
    >>> b = Rows(("bad", "good"), np.array([0, 1]), ("x", "y"), ("no", "yes"))
    >>> digest(a) == digest(b)
    True
    """
    hashes = sorted(hashlib.sha256(text.encode()).digest() for text in rows.texts)
    return hashlib.sha256(b"fedloom rows 1\n" + b"".join(hashes)).hexdigest()


def documents(rows: Rows) -> Iterator[dict[str, Any]]:
    """The rows as the JSON objects of a .jsonl file, which `load_rows` reads back; groups are left out.

    A picture is named by the path `picture(i)`, to which the caller writes its bytes.
    """
    task = task_named(rows.task)
    yield from (task.document(rows, index) for index in range(len(rows)))


def picture(number: int) -> str:
    """Path of a picture beside the file that `documents` is written to.

    >>> picture(7)
    'pictures/000007'
    """
    return f"pictures/{number:06d}"


def recording_path(number: int) -> str:
    """Path of a recording beside that file.

    >>> recording_path(7)
    'recordings/000007'
    """
    return f"recordings/{number:06d}"
