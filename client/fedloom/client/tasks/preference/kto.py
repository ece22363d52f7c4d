"""Single answers to prompts, each good or bad: KTO."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.client.tasks.generation.completions import completion_tokens, log_likelihood
from fedloom.client.tasks.preference.reference import reference_scores
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows
    from fedloom.client.data.tokens import Encoded
    from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["KTO"]


class KTO(Task):
    """Single answers to prompts, each good or bad: `label` is true or false (Ethayarajh et al., ICML 2024).

    The paper compares an answer's gain with the mean gain of the batch's other answers. An example's loss would then
    depend on its batch, so it is compared with 0 here. What the base model itself says of an answer is computed once,
    at the start, and stays on the client.
    """

    traits: ClassVar[Traits] = Traits(
        "prompt, completion and label, true or false",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        labels=False,
        generates=True,
        beside=True,
        holds=("prompts",),
    )
    beta: float = Field(default=0.1, gt=0, le=10)
    """How strongly a change of an answer's log-probability counts; larger keeps nearer to the base model."""
    good: float = Field(default=1.0, gt=0, le=100)
    """Weight of good answers."""
    bad: float = Field(default=1.0, gt=0, le=100)
    """Weight of bad answers."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A prompt, an answer, and whether it is good."""
        return "prompt", "completion", "label"

    def read(self, cells: "Cells") -> "Record":
        """A prompt, an answer, and whether it is good."""
        prompt, completion = cells.completed()
        return cells.filled(prompt + completion, prompt=prompt, label="good" if cells.truth() else "")

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """Prompts, and 1 for a good answer and -1 for a bad one, float32; beside it what the base model will say."""
        signs = np.array([[1.0 if record.label else -1.0, 0.0] for record in records], np.float32)
        return {"labels": signs, "prompts": tuple(record.prompt for record in records)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A prompt, an answer, and whether it is good."""
        text, prompt = rows.texts[index], rows.prompts[index]
        return {"prompt": prompt, "completion": text[len(prompt) :], "label": bool(rows.labels[index][0] > 0)}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up answer to one question, good or bad in turn."""
        return {"prompt": "What happened? ", "completion": made_up_text(index), "label": index % 2 == 0}

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The prompt with its answer."""
        yield from completion_tokens(rows.texts, rows.prompts, tokenizer, max_length)

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Good or bad, and what the base model might say."""
        signs = generator.integers(2, size=count) * 2.0 - 1.0
        return np.stack([signs, generator.standard_normal(count)], 1).astype(np.float32)

    def prepare(self, model: "AdapterModel", encoded: "Encoded") -> "Encoded":
        """The log-probability that the base model gives each answer, beside its sign."""
        known = reference_scores(model, encoded)
        return replace(encoded, labels=np.concatenate([encoded.labels[:, :1], known], 1))

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The log-probability of each answer in nats, shape (batch, 1)."""
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return log_likelihood(found, batch["targets"])[0][:, None]

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """1 less the value of the answer's gain (equation 8 with z0 = 0), weighted."""
        import torch

        gain = self.beta * (scores[:, 0] - labels[:, 1])
        weight = torch.where(labels[:, 0] > 0, self.good, self.bad)
        return weight * torch.sigmoid(-labels[:, 0] * gain)

    def places(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The implicit reward of each answer, beside 1 if it is good and 0 if not."""
        return self.beta * (scores - labels[:, 1:])[:, None], (labels[:, :1] > 0).long()

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """Good, where the reward is above 0."""
        return (scores.squeeze(-1) > 0).long()
