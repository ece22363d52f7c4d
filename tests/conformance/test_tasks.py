"""Every task that comes with fedloom passes the battery."""

from typing import Any

import torch

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


class TestAudioClassification(TestTextClassification):
    name = "audio-classification"


class TestCausalLM(TaskConformance):
    name = "causal-lm"

    def task(self) -> Task:
        return task_named(self.name)


class TestInstruct(TestCausalLM):
    name = "instruct"


class TestSeq2Seq(TestCausalLM):
    name = "seq2seq"


class TestSpeechRecognition(TestCausalLM):
    name = "speech-recognition"


class TestImageText(TestCausalLM):
    name = "image-text"


class TestMultiLabel(TestTextClassification):
    name = "multi-label"


class TestOrdinal(TestTextClassification):
    name = "ordinal"
    outputs = (2,)

    def perfect(self, placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.arange(2).lt(wanted[..., None]).float() - 0.5


class TestRegression(TestCausalLM):
    name = "regression"


class TestSentenceEmbedding(TestCausalLM):
    name = "sentence-embedding"


class TestEmbeddingRegression(TestCausalLM):
    name = "embedding-regression"
    outputs = (4,)


class TestQuestionAnswering(TestCausalLM):
    name = "question-answering"
    outputs = (2, 5)

    def perfect(self, placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(wanted, 5).float()


class TestReward(TestCausalLM):
    name = "reward"
    outputs = (2,)

    def perfect(self, placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(wanted, 2).float()


class TestDPO(TestReward):
    name = "dpo"


class TestORPO(TestReward):
    name = "orpo"

    def answers(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, labels = super().answers(seed)
        return -scores.abs() - 0.01, labels  # log-probabilities


class TestKTO(TestCausalLM):
    name = "kto"
    outputs = (1,)

    def perfect(self, placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return wanted[..., None].float() - 0.5


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
