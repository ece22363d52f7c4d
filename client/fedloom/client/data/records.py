"""One row of a client's data, as it was read."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Record", "Turns"]

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
    """The label of each word, or "" where it has none; of a row with several labels these."""
    prompt: str = ""
    turns: Turns = ()
    image: bytes = b""
    audio: bytes = b""
    parts: tuple[str, ...] = ()
    """Its texts one by one, where it has several."""
    vector: npt.NDArray[np.float32] | None = None
    """What a teacher gives for it, shape (d,)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the row: its own, or those of its words."""
        return tuple(tag for tag in self.tags or (self.label,) if tag)
