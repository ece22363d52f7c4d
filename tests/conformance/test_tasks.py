"""Every task that comes with fedloom passes the battery."""

from typing import Any

from fedloom.client.tasks.api import Task, task_named
from fedloom.conformance.tasks import TaskConformance

LABELS = ("a", "b", "c")


class TestTextClassification(TaskConformance):
    name = "text-classification"

    def task(self) -> Task:
        return task_named(self.name, LABELS)


class TestTokenClassification(TestTextClassification):
    name = "token-classification"


class TestImageClassification(TestTextClassification):
    name = "image-classification"


class TestCausalLM(TaskConformance):
    name = "causal-lm"

    def task(self) -> Task:
        return task_named(self.name)


class TestInstruct(TestCausalLM):
    name = "instruct"


def test_the_battery_catches_a_loss_over_the_batch() -> None:
    class Mean(TestTextClassification):
        def task(self) -> Task:
            return _Leaking(labels=LABELS)

    try:
        Mean().test_an_examples_loss_and_gradient_do_not_depend_on_its_batch()
    except AssertionError:
        return
    raise AssertionError("the battery lets a loss through that looks at the batch")


class _Leaking(type(task_named("text-classification"))):  # type: ignore[misc]  # the registered class
    """A loss that looks at the others."""

    def loss(self, scores: Any, labels: Any) -> Any:
        return super().loss(scores - scores.mean(0), labels)
