"""What the labels in a data set stand for: all of them names, or all of them positions."""

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

from fedloom.core.config.file_format import LabelsAs
from fedloom.core.errors import DataError

__all__ = ["Labelling", "labelling"]

# What pandas makes of a whole number once a value of its column is missing.
_WHOLE = re.compile(r"(\d+)\.0+")


@dataclass(frozen=True)
class Labelling:
    """The one way in which all labels of a data set are read.

    Args:
        labels_as: The way.
        names: The label names, in the order of their classes.
    """

    labels_as: LabelsAs
    names: tuple[str, ...]

    @cached_property
    def _index(self) -> dict[str, int]:
        written = self.names if self.labels_as == "names" else map(str, range(len(self.names)))
        return {label: place for place, label in enumerate(written)}

    def class_of(self, label: str) -> int | None:
        """The class of a label as it is written in the data; None of one that is not among those expected."""
        whole = _WHOLE.fullmatch(label)
        return self._index.get(label, self._index.get(whole[1]) if whole else None)

    def __str__(self) -> str:
        """In words, such as labels are read as positions, 0 is 'bad'."""
        example = f", 0 is {self.names[0]!r}" if self.labels_as == "positions" else ""
        return f"labels are read as {self.labels_as}{example}"


def labelling(found: Set[str], names: tuple[str, ...], asked: LabelsAs | None) -> Labelling:
    """How the labels of a data set are read: in the way that fits them all.

    Args:
        found: All labels of the data.
        names: The label names, at least one.
        asked: The owner's word on it; None leaves it to the labels.

    Returns:
        If neither way fits all of them, the one that fits more.

    Raises:
        DataError: Both ways fit, and differ.
    """
    if asked is not None:
        return Labelling(asked, names)
    ways = Labelling("names", names), Labelling("positions", names)
    by_name, by_position = ([way.class_of(label) for label in found] for way in ways)
    if None in by_name or None in by_position:
        return ways[by_name.count(None) > by_position.count(None)]
    if by_name != by_position:
        # An example of the names alone: which of them the data have is nobody's business.
        first = next(name for name in names if ways[1].class_of(name) not in (None, ways[0].class_of(name)))
        place = ways[1].class_of(first)
        assert place is not None  # chosen so
        raise DataError(
            f"every label can be read as a name and as a position from 0: {first} is the label {first!r} as a name and "
            f'{names[place]!r} as a position; add labels_as = "names" or labels_as = "positions" to [data]'
        )
    return ways[0]
