"""One row of a client's data: which columns a task reads, and what must hold for each.

An error names the place and the remedy and never a row's content: it may end in a log that somebody else reads.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

from fedloom.core.config.file_format import Column
from fedloom.core.config.run import Task
from fedloom.core.errors import DataError

__all__ = ["LAYOUTS", "Layout", "Record", "Turns"]

Turns = tuple[tuple[str, str], ...]
"""Role and content of each turn of a conversation."""


class Record(NamedTuple):
    """One row as read, before its labels are looked up."""

    where: str
    text: str
    """The whole content, see `Rows.texts`."""
    label: str = ""
    group: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    prompt: str = ""
    turns: Turns = ()
    image: bytes = b""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the row: its own, or one for each word."""
        return self.tags or ((self.label,) if self.label else ())


_CONTENTS: tuple[Column, ...] = ("text", "prompt", "tokens", "messages", "image")
"""Columns that hold what a row is about, of which it has one; a completion belongs to its prompt."""

_ROLES = ("system", "user", "assistant")

LAYOUTS: dict[Task, str] = {
    "text-classification": "text and label",
    "token-classification": "tokens and tags",
    "causal-lm": "text, or prompt and completion",
    "instruct": "messages, or prompt and completion",
    "image-classification": "image and label",
}
"""The columns of each task, in words."""


@dataclass(frozen=True)
class Layout:
    """Where the columns of a task are in the owner's file.

    Args:
        task: What the rows are for.
        names: The file's name of a column, where it is not the column's own. If it names what the rows are about,
            other columns that could be that are not read, whatever task a coordinator asks for.
    """

    task: Task
    names: Mapping[Column, str] = field(default_factory=dict)

    def name(self, column: Column) -> str:
        """The file's name of a column."""
        return self.names.get(column, column)

    def visible(self, present: Collection[str]) -> set[Column]:
        """The columns that are among those of a file and may be read."""
        own = {column for column in (*_CONTENTS, "completion") if column in self.names}
        own |= {"prompt", "completion"} if own & {"prompt", "completion"} else set()
        hidden = {*_CONTENTS, "completion"} - own if own else set()
        return {column for column in get_args(Column) if self.name(column) in present and column not in hidden}

    def needed(self, present: Collection[str]) -> tuple[Column, ...]:
        """The columns a row must have; where a task has two layouts, they are told apart by what is present."""
        if self.task == "text-classification":
            return "text", "label"
        if self.task == "image-classification":
            return "image", "label"
        if self.task == "token-classification":
            return "tokens", "tags"
        if self.visible(present) & {"prompt", "completion"}:
            return "prompt", "completion"
        return ("messages",) if self.task == "instruct" else ("text",)

    def wanted(self, present: Collection[str]) -> list[str]:
        """The file's names of all columns that `read` looks at."""
        return [self.name(column) for column in get_args(Column) if column in self.visible(present)]

    def missing(self, present: Collection[str]) -> list[str]:
        """The file's names of the columns that are needed and absent."""
        seen = self.visible(present)
        return [self.name(column) for column in self.needed(present) if column not in seen]

    def read(self, row: Mapping[str, object], where: str) -> Record:
        """One row, checked.

        A row with the contents of two tasks is refused: the same person's words would get a second privacy account
        when a coordinator asks for the other task.

        Raises:
            DataError: The row does not fit the task.
        """
        if missing := self.missing(row):
            raise DataError(f"{where} has no {missing[0]!r}; {LAYOUTS[self.task]} are needed, group is optional")
        seen = self.visible(row)
        values = {column: row[self.name(column)] for column in seen}
        contents = [column for column in _CONTENTS if values.get(column) is not None and column in seen]
        if len(contents) > 1:
            raise DataError(
                f"{where} has both {' and '.join(map(self.name, contents))}; keep one, so that the row has one privacy "
                "account, or name the one to be read in data.columns"
            )
        group = self._group(values.get("group"), where)
        if self.task == "token-classification":
            words, tags = self._words(values, where), self._tags(values, where)
            if len(words) != len(tags):
                raise DataError(f"{where} has {len(words)} tokens and {len(tags)} tags; every token needs one tag")
            return _filled(Record(where, " ".join(words), group=group, words=words, tags=tags))
        if self.task == "image-classification":
            return Record(where, "", self._label(values["label"], where), group, image=self._image(values, where))
        if self.task == "text-classification":
            text = self._string(values, "text", where)
            return _filled(Record(where, text, self._label(values["label"], where), group))
        if self.needed(row) == ("prompt", "completion"):
            prompt, completion = self._string(values, "prompt", where), self._string(values, "completion", where)
            if not completion.strip():
                raise DataError(f"{where}: the {self.name('completion')} is empty; fill it in or remove the row")
            turns: Turns = (("user", prompt), ("assistant", completion)) if self.task == "instruct" else ()
            return _filled(Record(where, prompt + completion, group=group, prompt=prompt, turns=turns))
        if self.task == "causal-lm":
            return _filled(Record(where, self._string(values, "text", where), group=group))
        turns = self._turns(values, where)
        return _filled(Record(where, "".join(content for _, content in turns), group=group, turns=turns))

    def _string(self, values: Mapping[Column, object], column: Column, where: str) -> str:
        value = values[column]
        if not isinstance(value, str):
            raise DataError(f"{where}: {self.name(column)} must be a string; found {_kind(value)}")
        return value

    def _label(self, value: object, where: str) -> str:
        if _missing(value) or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where}: a label is empty; fill it in or remove the row")
        # pandas writes whole numbers as 1.0 once a value of their column is missing; which label that is, `labelling`
        # says.
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, str | int) or whole):
            raise DataError(f"{where}: a label must be a label's name or its index; found {_kind(value)}")
        return _unicode(str(value), where, "a label")

    def _group(self, value: object, where: str) -> str:
        """A group's name; a number, a date or the like is one too, as it is written."""
        if _missing(value):
            return ""
        if isinstance(value, list | dict | bytes):
            raise DataError(
                f"{where}: {self.name('group')} must be a string or a number; found {_kind(value)}. To leave that "
                "column unread, name another in data.columns for group, there or not"
            )
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def _words(self, values: Mapping[Column, object], where: str) -> tuple[str, ...]:
        value = values["tokens"]
        full = isinstance(value, list) and value and all(isinstance(word, str) and word.strip() for word in value)
        if not full or not isinstance(value, list):
            raise DataError(
                f"{where}: {self.name('tokens')} must be a list of words, none of them empty; found {_kind(value)}"
            )
        return tuple(value)

    def _tags(self, values: Mapping[Column, object], where: str) -> tuple[str, ...]:
        value = values["tags"]
        if not isinstance(value, list):
            raise DataError(
                f"{where}: {self.name('tags')} must be a list with one label for each token; found {_kind(value)}"
            )
        return tuple(self._label(tag, where) for tag in value)

    def _turns(self, values: Mapping[Column, object], where: str) -> Turns:
        value = values["messages"]
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

    def _image(self, values: Mapping[Column, object], where: str) -> bytes:
        value = values["image"]
        if isinstance(value, dict):  # as Hugging Face datasets store a picture
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise DataError(f"{where}: {self.name('image')} has no picture; found {_kind(value)}")
        return value


def _filled(record: Record) -> Record:
    if not record.text.strip():
        raise DataError(f"{record.where}: the text is empty; fill it in or remove the row")
    _unicode(record.text, record.where, "the text")
    return record


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
