"""Figures of a classification against scikit-learn's and a loop's."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

from fedloom.client.eval.figures import calibration_error, classification_figures


def softmax(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    powers: npt.NDArray[Any] = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 4])
def test_figures_are_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=200)
    scores = (rng.normal(size=(200, classes)) + 1.5 * np.eye(classes)[labels]).astype(np.float32)

    found = classification_figures(scores, labels)

    chances, answers = softmax(scores), scores.argmax(1)
    area = roc_auc_score(labels, chances[:, 1] if classes == 2 else chances, multi_class="ovr")
    assert found["auroc"] == pytest.approx(area)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(labels, answers))
    assert found["f1_macro"] == pytest.approx(f1_score(labels, answers, average="macro"))


def test_calibration_error_is_the_gap_of_each_bin_by_its_share() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 500)
    labels = (rng.uniform(size=500) > sure**2).astype(np.int64)
    chances = np.stack([sure, 1 - sure], 1)

    right, said = calibration_curve(labels == 0, sure, n_bins=15)
    counts = np.histogram(sure, bins=np.linspace(0, 1, 16))[0]

    assert calibration_error(chances, labels) == pytest.approx(np.abs(right - said) @ counts[counts > 0] / 500)


def test_rows_of_one_class_leave_out_what_has_no_value() -> None:
    found = classification_figures(np.array([[2.0, 0.0]] * 3, np.float32), np.zeros(3, np.int64))
    assert found.keys() == {"f1_macro", "ece"}
