"""Which columns of an owner's file a task reads."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import get_args

from fedloom.client.data.cells import Cells
from fedloom.client.data.records import Record
from fedloom.client.tasks.api import task_named
from fedloom.core.config.file_format import Column
from fedloom.core.errors import DataError

__all__ = ["Layout"]

_CONTENTS: tuple[Column, ...] = ("text", "prompt", "tokens", "messages", "image")
"""Columns that hold what a row is about, of which it has one; a completion belongs to its prompt."""

_FURTHER: tuple[Column, ...] = ("completion", "question", "second", "chosen", "rejected", "audio")
"""Columns that hold more of what a row is about: a task that reads one of them and one that does not would have two
privacy accounts for the same row."""


@dataclass(frozen=True)
class Layout:
    """Where the columns of a task are in the owner's file.

    Args:
        task: What the rows are for.
        names: The file's name of a column, where it is not the column's own. If it names what the rows are about,
            other columns that could be that are not read, whatever task a coordinator asks for.
    """

    task: str
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
        return task_named(self.task).needed(self.visible(present))

    @property
    def columns(self) -> str:
        """The columns of the task, in words."""
        return task_named(self.task).traits.columns

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
            raise DataError(f"{where} has no {missing[0]!r}; {self.columns} are needed, group is optional")
        seen = self.visible(row)
        values = {column: row[self.name(column)] for column in seen}
        contents = [column for column in _CONTENTS if values.get(column) is not None and column in seen]
        needed = self.needed(row)
        if len(contents) > 1 and not set(contents) <= set(needed):
            raise DataError(
                f"{where} has both {' and '.join(map(self.name, contents))}; keep one, so that the row has one privacy "
                "account, or name the one to be read in data.columns"
            )
        if beyond := [column for column in _FURTHER if values.get(column) is not None and column not in needed]:
            raise DataError(
                f"{where} has {self.name(beyond[0])!r}, which {self.task} does not read; remove that column, so "
                "that the row has one privacy account, or take the task that it is for"
            )
        return task_named(self.task).read(Cells(values, self.names, where, needed))
