"""Precision, recall and F1 of each class, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import encode
from fedloom.client.eval.confusion import class_scores, classes_document, count, missed
from fedloom.client.eval.score import evaluate
from fedloom.client.models.adapter_model import AdapterModel

LABELS = ("routine", "urgent", "critical", "other")


@pytest.fixture
def answers() -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
    """400 true and predicted classes; the third is never predicted."""
    rng = np.random.default_rng(0)
    true = rng.choice(4, 400, p=[0.6, 0.2, 0.15, 0.05])
    return true, np.where(rng.random(400) < 0.7, np.where(true == 2, 0, true), rng.choice([0, 1, 3], 400))


def test_every_class_has_its_figures(answers: tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]) -> None:
    true, predicted = answers

    confusion = count(true, predicted, 4)

    np.testing.assert_array_equal(confusion, confusion_matrix(true, predicted))
    precision, recall, f1, support = precision_recall_fscore_support(true, predicted, zero_division=0)
    for index, each in enumerate(class_scores(confusion, LABELS)):
        assert (each.label, each.examples) == (LABELS[index], support[index])
        assert each.precision == (None if index == 2 else pytest.approx(precision[index]))
        assert each.recall == pytest.approx(recall[index])
        assert each.f1 == pytest.approx(f1[index])
    expected = f1_score(true, predicted, average="macro", zero_division=0)
    assert classes_document(confusion, LABELS)["macro_f1"] == pytest.approx(expected)
    assert missed(confusion, LABELS) == ["critical"]


def test_an_evaluation_counts_every_row_once(tiny_model: AdapterModel, rows: Rows) -> None:
    encoded = encode(rows, tiny_model.tokenizer, 16)

    score = evaluate(tiny_model, encoded, 7)

    table = np.array(score.confusion)
    np.testing.assert_array_equal(table.sum(1), np.bincount(rows.labels, minlength=2))
    assert np.trace(table) / table.sum() == score.accuracy
