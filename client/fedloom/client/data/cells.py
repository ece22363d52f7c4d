"""One row as it lies in a file: its cells, each read as what a task takes it for.

An error names the place and the remedy and never a row's content: it may end in a log that somebody else reads.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.client.data.records import Record, Turns
from fedloom.core.config.file_format import Column
from fedloom.core.errors import DataError

__all__ = ["Cells"]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Cells:
    """The cells of one row. Every method raises `DataError` for what it cannot take.

    Args:
        values: By column.
        names: The file's name of a column, where it is not the column's own.
        where: The row's place.
        needed: The columns that its task needs.
    """

    values: Mapping[Column, object]
    names: Mapping[Column, str]
    where: str
    needed: tuple[Column, ...]

    def name(self, column: Column) -> str:
        """The file's name of a column."""
        return self.names.get(column, column)

    def fault(self, what: str) -> DataError:
        """An error that names the place."""
        return DataError(f"{self.where} {what}")

    def record(self, text: str, **fields: Any) -> Record:
        """A row of this content."""
        return Record(self.where, text, group=self.group(), **fields)

    def filled(self, text: str, **fields: Any) -> Record:
        """A row of this text, which is not empty."""
        if not text.strip():
            raise DataError(f"{self.where}: the text is empty; fill it in or remove the row")
        _unicode(text, self.where, "the text")
        return self.record(text, **fields)

    def completed(self) -> tuple[str, str]:
        """A prompt and what follows it."""
        prompt, completion = self.string("prompt"), self.string("completion")
        if not completion.strip():
            raise DataError(f"{self.where}: the {self.name('completion')} is empty; fill it in or remove the row")
        return prompt, completion

    def string(self, column: Column) -> str:
        """A text."""
        value, where = self.values[column], self.where
        if not isinstance(value, str):
            raise DataError(f"{where}: {self.name(column)} must be a string; found {_kind(value)}")
        return value

    def label(self) -> str:
        """A label's name or index, as it is written."""
        return self._label(self.values["label"])

    def number(self) -> float:
        """The label as a finite number."""
        value = self.values["label"]
        try:
            found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # refused below
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise DataError(f"{self.where}: {self.name('label')} must be a finite number; found {_kind(value)}")
        return found

    def vector(self) -> npt.NDArray[np.float32]:
        """A list of finite numbers, in a table of texts written as in JSON; shape (d,), d at least 1."""
        value = self.values["vector"]
        try:
            listed = json.loads(value) if isinstance(value, str) else value
            plain = isinstance(listed, list) and all(type(each) in (int, float) for each in listed)
            found = np.array(listed if plain else [], np.float64)
        except (ValueError, OverflowError, RecursionError):  # no JSON, or a whole number beyond all floats
            found = np.zeros(0)
        if not len(found) or not (np.abs(found) <= np.finfo(np.float32).max).all():
            raise DataError(
                f"{self.where}: {self.name('vector')} must be a list of finite numbers, [0.1, -0.2, ...]; found "
                f"{_kind(value)}"
            )
        return found.astype(np.float32)

    def truth(self) -> bool:
        """The label as true or false, which tables may write as 1 or 0, or in words."""
        value = self.values["label"]
        word = value.strip().lower() if isinstance(value, str) else value
        if word in ("true", "1") or (not isinstance(word, str) and word == 1):
            return True
        if word in ("false", "0") or (not isinstance(word, str) and word == 0):
            return False
        raise DataError(f"{self.where}: {self.name('label')} must be true or false; found {_kind(value)}")

    def labels(self) -> tuple[str, ...]:
        """Any number of labels: a list, or a text with semicolons between them."""
        value = self.values["label"]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(";") if part.strip()]
        if not isinstance(value, list):
            raise DataError(f"{self.where}: {self.name('label')} must be a list of labels; found {_kind(value)}")
        return tuple(dict.fromkeys(self._label(each) for each in value))

    def _label(self, value: object) -> str:
        where = self.where
        if _missing(value) or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where}: a label is empty; fill it in or remove the row")
        # pandas writes whole numbers as 1.0 once a value of their column is missing; which label that is, `labelling`
        # says.
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, str | int) or whole):
            raise DataError(f"{where}: a label must be a label's name or its index; found {_kind(value)}")
        return _unicode(str(value), where, "a label")

    def group(self) -> str:
        """A group's name; a number, a date or the like is one too, as it is written."""
        value, where = self.values.get("group"), self.where
        if _missing(value):
            return ""
        if isinstance(value, list | dict | bytes):
            raise DataError(
                f"{where}: {self.name('group')} must be a string or a number; found {_kind(value)}. To leave that "
                "column unread, name another in data.columns for group, there or not"
            )
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def words(self) -> tuple[str, ...]:
        """A list of words."""
        value, where = self.values["tokens"], self.where
        full = isinstance(value, list) and value and all(isinstance(word, str) and word.strip() for word in value)
        if not full or not isinstance(value, list):
            raise DataError(
                f"{where}: {self.name('tokens')} must be a list of words, none of them empty; found {_kind(value)}"
            )
        return tuple(value)

    def tags(self) -> tuple[str, ...]:
        """A list of labels; "" for null, a word that has none."""
        value, where = self.values["tags"], self.where
        if not isinstance(value, list):
            form = "must be a list with one label for each token, or null"
            raise DataError(f"{where}: {self.name('tags')} {form}; found {_kind(value)}")
        return tuple("" if tag is None else self._label(tag) for tag in value)

    def turns(self) -> Turns:
        """A conversation: role and content of each turn, one of them at least the assistant's."""
        value, where = self.values["messages"], self.where
        name = self.name("messages")
        form = f'{name} must be a list of objects with "role" ({", ".join(_ROLES)}) and "content", a string'
        if not isinstance(value, list):
            raise DataError(f"{where}: {form}; found {_kind(value)}")
        turns: list[tuple[str, str]] = []
        for number, each in enumerate(value, 1):
            role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
            if role not in _ROLES or not isinstance(content, str):
                raise DataError(f"{where}: {form}; number {number} is not one")
            turns.append((role, content))
        if not any(role == "assistant" and content.strip() for role, content in turns):
            raise DataError(f"{where}: no turn of {name} is the assistant's, so there is nothing to learn; add one")
        return tuple(turns)

    def bytes(self, column: Column) -> bytes:
        """What is in the file of an image or a recording."""
        value = self.values[column]
        if isinstance(value, dict):  # as Hugging Face datasets store one
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise DataError(f"{self.where}: {self.name(column)} has no file; found {_kind(value)}")
        return value


def _missing(value: object) -> bool:
    """Whether a table has nothing there: pandas writes NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unicode(text: str, where: str, what: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: {what} has half of a surrogate pair; write the file as valid Unicode")
    return text


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list of another kind",
    dict: "an object",
    bytes: "bytes",
    type(None): "nothing",
}


def _kind(value: object) -> str:
    """What a value is, without saying which."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
