"""What every task must do.

::

    from fedloom.conformance.tasks import TaskConformance

    class TestMine(TaskConformance):
        name = "mine"

        def task(self):
            return Mine(labels=("a", "b"))
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.data.layout import Layout
from fedloom.client.data.load import assembled, identified
from fedloom.client.data.records import Record
from fedloom.client.data.rows import Rows, documents
from fedloom.client.tasks.api import Task
from fedloom.core.config.file_format import Form
from fedloom.core.errors import DataError

__all__ = ["TaskConformance"]

_ROWS, _PLACES, _OUTPUTS = 6, 5, 4


class TaskConformance:
    """The battery. Define `name` and `task`."""

    name: str
    """The task's entry point, which must be installed."""
    outputs: tuple[int, ...] | None = None
    """Shape of one example's scores; None: one for each label, and with `per_token` so many at each token."""

    def task(self) -> Task:
        """A task with labels, where it has classes: at most four."""
        raise NotImplementedError("define task() in the subclass and return the task under test")

    def test_its_options_are_a_described_model(self) -> None:
        """The run file's keys, the JSON Schema and the reference come from it."""
        task = self.task()

        assert (type(task).__doc__ or "").strip(), "the first line of its docstring is the summary"
        assert type(task).model_validate_json(task.model_dump_json()) == task
        for key, spec in type(task).model_json_schema()["properties"].items():
            assert spec.get("description"), f"say below {key} what it means"

    def test_rows_are_read_back_as_they_were_written(self) -> None:
        """What a row is written as is what the same row is read from; images are written beside it."""
        rows = self.rows()
        if self.task().traits.media:
            return

        again = assembled(self.records(list(documents(rows))), rows.label_names, self.name, "a file", Form())

        assert again.texts == rows.texts
        np.testing.assert_array_equal(again.labels, rows.labels)
        assert list(documents(again)) == list(documents(rows))

    def test_a_row_that_lacks_something_is_refused_with_its_place(self) -> None:
        """And the message quotes nothing of the row."""
        whole = self.task().sample(0)
        for column in whole:
            for spoilt in ({key: each for key, each in whole.items() if key != column}, {**whole, column: None}):
                with pytest.raises(DataError, match="row 1") as raised:
                    self.records([spoilt])
                contents = [each for each in spoilt.values() if isinstance(each, str) and len(each) > 8]
                assert not any(each in str(raised.value) for each in contents)

    def test_an_examples_loss_and_gradient_do_not_depend_on_its_batch(self) -> None:
        """DP-SGD's noise covers what one example adds to a sum, and no more."""
        task, (scores, labels) = self.task(), self.answers(1)
        others, _ = self.answers(2)
        for row in range(_ROWS):
            mixed = others.clone()
            mixed[row] = scores[row]
            alone = _gradient(task, scores[row : row + 1], labels[row : row + 1])
            together = _gradient(task, mixed, labels)
            assert torch.equal(alone[0], together[0][row : row + 1])
            torch.testing.assert_close(alone[1][0], together[1][row], rtol=0, atol=0)

    def test_a_loss_is_one_number_for_each_example(self) -> None:
        """Finite, and never negative."""
        scores, labels = self.answers(1)

        loss = self.task().loss(scores, labels)

        assert loss.shape == (_ROWS,)
        assert torch.isfinite(loss).all()
        assert (loss >= 0).all()

    def test_a_perfect_answer_is_right(self) -> None:
        """Right is a truth value at each place, and the scores that say the label are right."""
        task, (scores, labels) = self.task(), self.answers(1)
        placed, wanted = task.places(scores, labels)

        right = task.right(placed, wanted)

        assert right.dtype == torch.bool
        assert right.shape == wanted.shape
        assert task.right(self.perfect(placed, wanted), wanted).all()

    def test_metrics_of_parts_merge_to_those_of_the_whole(self) -> None:
        """Their sums add up."""
        task, (scores, labels) = self.task(), self.answers(1)
        placed, wanted = task.places(scores, labels)
        flat, told = placed.flatten(0, 1), wanted.flatten()

        parts: Counter[str] = Counter()
        for part in (slice(0, 2), slice(2, None)):
            parts.update(task.metrics(flat[part], told[part]))

        whole = task.summary(task.metrics(flat, told))
        assert task.summary(parts) == pytest.approx(whole, rel=1e-6, abs=1e-6)

    def test_made_up_labels_are_of_the_type_that_rows_have(self) -> None:
        """The sensitivity probe and the audit train on them, and not on what `prepare` has computed."""
        task, rows = self.task(), self.rows()
        drawn = task.draw(np.random.default_rng(0), 3, _OUTPUTS)

        assert len(drawn) == 3
        if not task.traits.per_token and type(task).prepare is Task.prepare:
            assert drawn.dtype.kind == rows.labels.dtype.kind
            assert drawn.ndim == rows.labels.ndim

    def test_what_is_reported_of_all_rows_is_finite(self) -> None:
        """Also where all rows have one label, of which some figures have no value and are left out."""
        task, (scores, labels) = self.task(), self.answers(1)
        placed, wanted = task.places(scores, labels)
        for part in (slice(None), slice(0, 1)):
            flat, told = placed[part].flatten(0, 1).numpy(), wanted[part].flatten().numpy()
            rows = np.repeat(np.arange(len(wanted[part])), wanted.shape[1])
            assert all(np.isfinite(value) for value in task.report(flat, told, rows).values())

    def perfect(self, placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Scores at each place that say the label."""
        task = self.task()
        if task.traits.labels or task.traits.generates:
            return torch.nn.functional.one_hot(wanted, placed.shape[-1]).float()
        return wanted[..., None].to(placed.dtype)

    def records(self, raw: Sequence[Any]) -> list[Record]:
        """Rows of a file as they are read."""
        layout = Layout(self.name)
        return [identified(layout.read(row, f"row {number}")) for number, row in enumerate(raw, 1)]

    def rows(self) -> Rows:
        """Made-up rows."""
        task = self.task()
        found = self.records([task.sample(index) for index in range(4)])
        return assembled(found, task.labels, self.name, "made-up data", Form())

    def answers(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random scores and labels, as a model and `collate` give them."""
        task, generator = self.task(), np.random.default_rng(seed)
        outputs = self.outputs or (max(1, len(task.labels)) if not task.traits.generates else _OUTPUTS,)
        count = (_ROWS, _PLACES) if task.traits.per_token else (_ROWS,)
        drawn = task.draw(generator, int(np.prod(count)), outputs[-1])
        labels = torch.from_numpy(drawn.reshape(*count, *drawn.shape[1:]))
        return torch.from_numpy(generator.standard_normal((*count, *outputs)).astype(np.float32)), labels


def _gradient(task: Task, scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the gradient of their sum."""
    scores = scores.clone().requires_grad_()
    loss = task.loss(scores, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), gradient
