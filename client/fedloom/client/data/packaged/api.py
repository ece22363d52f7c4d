"""What a data source is: rows that are named in `[data] source`, not a file of the owner."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from fedloom.client.data.records import Record
from fedloom.core.errors import DataError

__all__ = ["DataSource", "Split", "fields", "lines"]

Split = Literal["train", "test"]


class DataSource(Protocol):
    """A data set of the entry-point group `fedloom.data`."""

    @property
    def task(self) -> str:
        """What its rows are for."""

    def records(self, split: Split) -> Iterator[Record]:
        """The rows of one split, the same on every machine; no row is in both.

        Raises:
            DataError: It is not here, or damaged.
        """


def lines(path: Path) -> list[str]:
    """Lines without their ends; `str.splitlines` would also split at separators within a text."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete its folder to fetch the asset again") from error


def fields(line: str, count: int, where: str) -> list[str]:
    """The fields of a line, which tabs separate.

    Raises:
        DataError: There are not `count`; it says `where`.
    """
    found = line.split("\t")
    if len(found) != count:
        raise DataError(f"{where} has {len(found)} fields instead of {count}; delete its folder to fetch it again")
    return found
