"""What a data owner learns before joining: every fault, what is cut off, and what the run would cost."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedloom.client.data.load import load_rows
from fedloom.client.doctor import data_report as module
from fedloom.client.doctor.data_report import Report, check
from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import open_account
from fedloom.core.config.run import Spec
from fedloom.core.errors import DataError
from fedloom.core.privacy.accounting import epsilon
from fedloom.core.privacy.spends import training_spend

GOOD: list[tuple[str, ...]] = [
    ("good film", "positive"),
    ("bad plot", "negative"),
    ("great actor " * 20, "positive"),
] * 13


def site(
    policy: Policy, folder: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")
) -> Policy:
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return policy.model_copy(
        update={"data": policy.data.model_copy(update={"source": str(folder / "data.csv"), "declared_examples": 40})}
    )


def unnamed(policy: Policy) -> Policy:
    """A policy that does not say what its rows are for."""
    return policy.model_copy(update={"data": policy.data.model_copy(update={"labels": ()})})


def said(report: Report, level: str) -> list[str]:
    return [finding.text for finding in report.findings if finding.level == level]


def unlike(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with a number each, so that no two are the same."""
    return [(f"{number} {text}", *rest) for number, (text, *rest) in enumerate(rows)]


def test_sound_data_are_said_to_be_and_nothing_is_left_behind(policy: Policy, spec: Spec, tmp_path: Path) -> None:
    policy = site(policy, tmp_path, unlike(GOOD))

    report = check(policy, spec)

    assert report.sound
    assert (report.survey.rows, len(report.survey.usable)) == (39, 39)
    assert report.survey.labels == {"positive": 26, "negative": 13}
    assert report.lengths is not None
    assert report.lengths.cut == 13
    assert said(report, "warning") == ["13 rows (33.3%) lose their end at model.max_length = 16"]
    assert report.cost is not None
    assert (report.cost.before, report.cost.affordable) == (0.0, 2)
    assert report.cost.after == pytest.approx(epsilon([training_spend(spec)] * 2, policy.privacy.delta))
    assert not policy.client.state.exists(), "a look makes no account"
    assert json.loads(json.dumps(report.document()))["sound"] is True


def test_every_fault_is_counted_with_the_place_of_the_first(policy: Policy, spec: Spec, tmp_path: Path) -> None:
    rows: list[tuple[str, ...]] = [("good", "positive"), ("", "positive"), ("one field",), (" ", "negative")]
    rows += [
        ("sad", "neutral"),
        ("poor", "7"),
        ("good", "positive"),
        ("caf\u00c3\u00a9", "negative"),
        ("a\ufffdb", "negative"),
        ("a\x00b", "negative"),
    ]
    policy = site(policy, tmp_path, rows)

    report = check(policy, spec)

    assert not report.sound
    assert report.survey.rows == 10
    errors, warnings = "\n".join(said(report, "error")), "\n".join(said(report, "warning"))
    assert "2 rows, the first at " in errors
    assert "line 3: the text is empty" in errors
    assert "1 row, the first at" in errors
    assert "2 fields are needed" in errors
    assert "2 labels are not among those expected ('negative', 'positive'): '7', 'neutral'" in errors
    for oddity in ("the same content again", "read as Latin-1", "U+FFFD", "control characters"):
        assert oddity in warnings
    assert "line 8: the same content" in warnings
    # Training agrees.
    with pytest.raises(DataError):
        load_rows(policy.data.source, spec.model.labels, "train")


def test_what_was_spent_counts_and_a_spent_budget_is_an_error(policy: Policy, spec: Spec, tmp_path: Path) -> None:
    policy = site(policy, tmp_path, unlike(GOOD))
    each = training_spend(spec)
    one = epsilon([each], policy.privacy.delta)
    mine = policy.privacy.model_copy(update={"epsilon": 1.01 * epsilon([each] * 2, policy.privacy.delta)})
    policy = policy.model_copy(update={"privacy": mine})
    rows = load_rows(policy.data.source, spec.model.labels, "train")

    with open_account(policy, rows) as ledger:
        ledger.reserve("before", 0, each, budget=mine.epsilon, delta=mine.delta)
    report = check(policy, spec)
    assert report.cost is not None
    assert report.cost.before == pytest.approx(one, rel=1e-2)
    assert report.sound
    assert f"the budget of epsilon {mine.epsilon:g} pays for 1 of 2 rounds" in said(report, "warning")

    with open_account(policy, rows) as ledger:
        ledger.reserve("before", 1, each, budget=mine.epsilon, delta=mine.delta)
    report = check(policy, spec)
    assert not report.sound
    assert f"the budget of epsilon {mine.epsilon:g} pays for 0 of 2 rounds" in said(report, "error")


def test_a_run_that_the_policy_refuses_and_a_base_model_that_is_not_here_are_errors(
    policy: Policy, spec: Spec, tmp_path: Path
) -> None:
    policy = site(policy, tmp_path, unlike(GOOD))
    strict = policy.model_copy(update={"privacy": policy.privacy.model_copy(update={"min_noise_multiplier": 2.0})})
    absent = policy.model_copy(update={"model": policy.model.model_copy(update={"folder": str(tmp_path / "none")})})
    other = policy.model_copy(update={"model": policy.model.model_copy(update={"digests": ("sha256:" + "0" * 64,)})})

    assert any("noise multiplier 1 (at least 2)" in text for text in said(check(strict, spec), "error"))
    assert any("has no config.json" in text for text in said(check(absent, spec), "error"))
    assert any("this site allows sha256:000" in text for text in said(check(other, spec), "error"))


def test_a_declared_size_that_is_far_from_the_rows_is_warned_of(policy: Policy, spec: Spec, tmp_path: Path) -> None:
    policy = site(policy, tmp_path, unlike(GOOD))

    for declared, what in ((400, "shorter than they could be"), (10, "weighs less than it should")):
        data = policy.data.model_copy(update={"declared_examples": declared})
        assert any(what in text for text in said(check(policy.model_copy(update={"data": data}), spec), "warning"))


CASES: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (("text", "label"), ("a", "b"), "text-classification"),
    (("text", "id"), ("a", "b"), "causal-lm"),
    (("prompt", "completion"), ("a", "b"), "causal-lm"),
]


@pytest.mark.parametrize(("header", "row", "task"), CASES)
def test_without_a_run_the_columns_tell_the_task(
    header: tuple[str, ...], row: tuple[str, ...], task: str, policy: Policy, tmp_path: Path
) -> None:
    report = check(unnamed(site(policy, tmp_path, [row], header)), None)

    assert report.survey.task == task
    assert report.sound
    assert (report.lengths, report.cost) == (None, None)


def test_the_policy_and_not_the_run_says_which_labels_are_known(policy: Policy, spec: Spec, tmp_path: Path) -> None:
    policy = site(policy, tmp_path, unlike(GOOD))
    renamed = spec.model_copy(update={"model": spec.model.model_copy(update={"labels": ("bad", "good")})})

    report = check(policy, renamed)

    assert not report.survey.unknown
    (error,) = said(report, "error")
    assert "model.labels ['bad', 'good'] (data.labels = ['negative', 'positive']" in error


def test_without_a_run_other_formats_are_told_apart_too(policy: Policy, tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "token-classification": {"tokens": ["a"], "tags": ["O"]},
        "instruct": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }
    for task, row in rows.items():
        path = tmp_path / f"{task}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = policy.data.model_copy(update={"source": str(path), "labels": ()})
        assert check(policy.model_copy(update={"data": data}), None).survey.task == task


def test_data_that_cannot_be_read_at_all_is_refused(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"text,label\ncaf\xe9,positive\n")
    data = policy.data.model_copy(update={"source": str(tmp_path / "data.csv")})

    with pytest.raises(DataError, match="is not UTF-8"):
        check(policy.model_copy(update={"data": data}), None)
    with pytest.raises(DataError, match="has the columns x, y but not text and label"):
        check(site(policy, tmp_path, [("a", "b")], ("x", "y")), None)


def test_many_labels_are_not_all_listed() -> None:
    assert module._some([str(number) for number in range(30)]).endswith("19 ... (30 in all)")


@pytest.mark.parametrize(
    ("changed", "said_of_it"),
    [({"head": "frozen"}, 'model.head = "frozen"'), ({"max_length": 4000}, "4000"), ({"targets": ("none",)}, "none")],
    ids=["head", "length", "layers"],
)
def test_a_base_model_that_the_run_cannot_use_is_found_before_joining(
    policy: Policy, spec: Spec, tmp_path: Path, changed: dict[str, Any], said_of_it: str
) -> None:
    """As doctor and the start of a run find it, and not only that its folder is there."""
    section = "adapter" if "targets" in changed else "model"
    wrong = spec.model_copy(update={section: getattr(spec, section).model_copy(update=changed)})

    report = check(site(policy, tmp_path, unlike(GOOD)), wrong)

    assert not report.sound
    assert said_of_it in "\n".join(said(report, "error"))


@pytest.mark.parametrize(("white", "warned"), [(4095, "4,095 of 65,535"), (65535, "")])
def test_pictures_of_twelve_bits_in_sixteen_are_warned_of(
    policy: Policy, tmp_path: Path, white: int, warned: str
) -> None:
    for label in policy.data.labels:
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(2):
            values = np.linspace(0, white - number, 64).reshape(8, 8).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / "pictures" / label / f"{label}{number}.png")
    data = policy.data.model_copy(
        update={"source": str(tmp_path / "pictures"), "task": "image-classification", "declared_examples": 4}
    )

    report = check(policy.model_copy(update={"data": data}), None)

    found = [text for text in said(report, "warning") if "nearly black" in text]
    assert len(found) == bool(warned)
    assert all(warned in text and "every value times 16" in text for text in found)
