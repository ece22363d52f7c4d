"""Labelled texts in memory, and the identity of a data set."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedloom.proto.errors import DataError

__all__ = ["Indices", "Rows", "digest"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled texts, in a fixed order.

    Args:
        texts: n texts.
        labels: int64, shape (n,): position of each row's label in `label_names`.
        groups: n names of the silo a row belongs to; "" when it has none.
        label_names: The classes, in the order of the model's outputs.

    Raises:
        DataError: The lengths differ or a label is out of range.
    """

    texts: tuple[str, ...]
    labels: Indices
    groups: tuple[str, ...]
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse columns that do not belong together."""
        count = len(self.texts)
        if self.labels.shape != (count,) or len(self.groups) != count:
            raise DataError(
                f"{count} texts with labels of shape {self.labels.shape} and {len(self.groups)} groups; "
                "every row needs one text, one label and one group"
            )
        if count and not 0 <= self.labels.min() <= self.labels.max() < len(self.label_names):
            raise DataError(
                f"labels run from {self.labels.min()} to {self.labels.max()}; "
                f"0 to {len(self.label_names) - 1} are allowed, one for each label name"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    def take(self, indices: Indices) -> "Rows":
        """The rows at `indices`, in that order.

        Raises:
            IndexError: An index is out of range.
        """
        texts = tuple(self.texts[i] for i in indices)
        groups = tuple(self.groups[i] for i in indices)
        return Rows(texts, self.labels[indices], groups, self.label_names)


def digest(rows: Rows) -> str:
    """SHA-256 of the texts as a multiset, 64 hex digits: the identity under which privacy loss is accounted.

    It depends neither on the order of the rows nor on labels or groups. Label names come from the run file,
    so a coordinator that could change the digest through them would get a fresh privacy budget for the same
    people's texts.

    >>> a = Rows(("good", "bad"), np.array([1, 0]), ("", ""), ("negative", "positive"))
    >>> b = Rows(("bad", "good"), np.array([0, 1]), ("x", "y"), ("no", "yes"))
    >>> digest(a) == digest(b)
    True
    """
    hashes = sorted(hashlib.sha256(text.encode()).digest() for text in rows.texts)
    return hashlib.sha256(b"fedloom rows 1\n" + b"".join(hashes)).hexdigest()
