"""Figures of a classification that its confusion matrix does not say."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["calibration_error", "classification_figures", "entity_figures"]

_BINS = 15


def classification_figures(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """What reports quote beside accuracy; a figure that these rows give no value is left out.

    Args:
        scores: Logits, shape (n, classes).
        labels: Classes, shape (n,).

    Returns:
        f1_macro, the mean F1 of the classes; mcc, Matthews' correlation coefficient, -1 to 1; auroc, the area under the
        ROC curve, of more than two classes the mean of each against the others; ece, see `calibration_error`.
    """
    from scipy.special import softmax
    from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

    probabilities, answers = softmax(scores.astype(np.float64), axis=1), scores.argmax(1)
    figures = {"f1_macro": f1_score(labels, answers, average="macro", zero_division=0.0)}
    if len(np.unique(np.concatenate([labels, answers]))) > 1:
        figures["mcc"] = matthews_corrcoef(labels, answers)
    classes = range(1, 2) if scores.shape[1] == 2 else range(scores.shape[1])
    mixed = [each for each in classes if 0 < (labels == each).sum() < len(labels)]
    if mixed:
        figures["auroc"] = np.mean([roc_auc_score(labels == each, probabilities[:, each]) for each in mixed])
    figures["ece"] = calibration_error(probabilities, labels)
    return {name: float(value) for name, value in figures.items()}


def calibration_error(probabilities: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """How far the answers' probabilities are from the share of them that is right, from 0 to 1.

    Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017, equation 3).

    Args:
        probabilities: Shape (n, classes), n at least 1.
        labels: Classes, shape (n,).

    >>> calibration_error(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1]))
    0.0
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
    apart = np.abs(np.bincount(bins, sure, _BINS) - np.bincount(bins, right, _BINS))
    return float(apart.sum() / len(labels))


def entity_figures(
    answers: npt.NDArray[Any], labels: npt.NDArray[Any], rows: npt.NDArray[Any], names: Sequence[str]
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities: kind, first and last word must be right.

    As CoNLL's conlleval counts (Tjong Kim Sang and De Meulder, 2003): an entity begins at B-KIND, or at an I-KIND that
    follows another kind or none.

    Args:
        answers: Positions in `names`, shape (words,).
        labels: Likewise, what is right.
        rows: Which row each word is of, shape (words,).
        names: Of the labels.

    Returns:
        entity_precision, entity_recall and entity_f1; nothing where no name begins with B-.
    """
    if not any(name.startswith("B-") for name in names):
        return {}
    told, true = (_entities([names[each] for each in found], rows) for found in (answers, labels))
    right = len(told & true)
    precision, recall = right / max(1, len(told)), right / max(1, len(true))
    f1 = 2 * right / max(1, len(told) + len(true))
    return {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}


def _entities(tags: Sequence[str], rows: npt.NDArray[Any]) -> set[tuple[str, int, int]]:
    """Kind, first word and end of each entity."""
    found, begin = set[tuple[str, int, int]](), 0
    before, row_before = "O", -1
    for place, (tag, row) in enumerate(zip([*tags, "O"], [*rows.tolist(), -1], strict=True)):
        kind, kind_before = tag[2:], before[2:]
        if row != row_before or tag[:2] != "I-" or kind != kind_before:
            if kind_before:
                found.add((kind_before, begin, place))
            begin = place
        before, row_before = tag, row
    return found
