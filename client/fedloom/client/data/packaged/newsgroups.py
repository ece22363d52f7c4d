"""Posts of 20 Newsgroups."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedloom.client.assets.fetch import fetch
from fedloom.client.data.packaged.api import Split, fields, lines
from fedloom.client.data.records import Record

__all__ = ["Newsgroups"]


@dataclass(frozen=True)
class Newsgroups:
    """Posts of 20 Newsgroups in the split by date that the data set is published with: lower case, letters only."""

    task: ClassVar[str] = "text-classification"

    def records(self, split: Split) -> Iterator[Record]:
        """Rows of one file.

        Raises:
            DataError: See `fetch`.
        """
        path = fetch("newsgroups") / f"20newsgroups-{split}.tab"
        # The first three lines name the columns and their types.
        for number, line in enumerate(lines(path)[3:], 4):
            if line:
                label, text = fields(line, 2, f"{path} line {number}")
                yield Record(f"{path} line {number}", text, label, "")
