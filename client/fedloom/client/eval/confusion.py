"""What a model makes of each class: an accuracy hides a rare class that it never finds."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedloom.client.data.rows import Indices

__all__ = ["MOST_CLASSES", "ClassScore", "Confusion", "class_scores", "classes_document", "count", "missed"]

MOST_CLASSES = 100
"""Classes beyond which nobody reads a table; a language model's tokens are not counted."""

Confusion = tuple[tuple[int, ...], ...]
"""Rows are true classes, columns predicted ones; empty where there are too many."""


@dataclass(frozen=True)
class ClassScore:
    """One class against all others; None is a share of nothing."""

    label: str
    examples: int
    """Held-out examples, or labelled tokens, that are of the class."""
    precision: float | None
    """Share of those predicted to be of the class that are."""
    recall: float | None
    """Share of those of the class that are predicted to be."""
    f1: float | None
    """Harmonic mean of both."""


def count(true: Indices, predicted: Indices, classes: int) -> Confusion:
    """The confusion matrix of as many true and predicted classes.

    >>> count(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    ((1, 1), (0, 1))
    """
    table = np.bincount(true * classes + predicted, minlength=classes * classes)
    return tuple(tuple(int(each) for each in row) for row in table.reshape(classes, classes))


def class_scores(confusion: Confusion, labels: tuple[str, ...]) -> list[ClassScore]:
    """Precision, recall and F1 of every class.

    >>> [(each.precision, each.recall) for each in class_scores(((3, 1), (0, 0)), ("a", "b"))]
    [(1.0, 0.75), (0.0, None)]
    """
    table = np.array(confusion, np.int64).reshape(len(confusion), len(confusion))
    found = []
    for index, label in enumerate(labels[: len(confusion)]):
        right, true, told = int(table[index, index]), int(table[index].sum()), int(table[:, index].sum())
        f1 = _share(2 * right, true + told)
        found.append(ClassScore(label, true, _share(right, told), _share(right, true), f1))
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def classes_document(confusion: Confusion, labels: tuple[str, ...]) -> dict[str, Any]:
    """The same for programs, with the mean F1 over the classes that occur."""
    scores = class_scores(confusion, labels)
    known = [each.f1 for each in scores if each.examples and each.f1 is not None]
    return {
        "macro_f1": float(np.mean(known)) if known else None,
        "classes": [asdict(each) for each in scores],
        "confusion": [list(row) for row in confusion],
    }


def missed(confusion: Confusion, labels: tuple[str, ...]) -> list[str]:
    """The classes that occur and are never found."""
    return [each.label for each in class_scores(confusion, labels) if each.recall == 0.0]
