"""Two answers to one prompt, of which one is preferred: DPO, ORPO, and a reward model."""

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

__all__ = ["DPO", "ORPO", "Reward"]

_PAIRS = Traits(
    "prompt, chosen and rejected",
    "AutoModelForCausalLM",
    "CAUSAL_LM",
    labels=False,
    generates=True,
    sequences=2,
    beside=True,
    holds=("parts",),
)


class _Pairs(Task):
    """Rows of a prompt and two answers; the answer that scores more is the model's. One pair is one example."""

    traits: ClassVar[Traits] = _PAIRS

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A prompt, the answer that is preferred, and the other one."""
        return "prompt", "chosen", "rejected"

    def read(self, cells: "Cells") -> "Record":
        """A prompt and two answers."""
        prompt, chosen, rejected = (cells.string(column) for column in ("prompt", "chosen", "rejected"))
        for column, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.strip():
                raise cells.fault(f"has nothing in {column}; fill it in or remove the row")
        return cells.filled(prompt + chosen + rejected, parts=(prompt, chosen, rejected))

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """Prompts and answers; the label of a pair is the first of its answers."""
        return {"parts": tuple(record.parts for record in records)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A prompt and two answers."""
        return dict(zip(("prompt", "chosen", "rejected"), rows.parts[index], strict=True))

    def sample(self, index: int) -> Mapping[str, object]:
        """Two made-up answers to one question."""
        chosen, rejected = made_up_text(index), made_up_text(index + 1)
        return {"prompt": "What happened? ", "chosen": chosen, "rejected": rejected}

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The prompt with the one answer, and with the other one."""
        texts = [prompt + answer for prompt, *answers in rows.parts for answer in answers]
        yield from completion_tokens(texts, [row[0] for row in rows.parts for _ in range(2)], tokenizer, max_length)

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """The first answer of every pair."""
        return np.zeros(count, np.int64)


class DPO(_Pairs):
    """The preferred one of two answers, by direct preference optimisation (Rafailov et al., NeurIPS 2023, equation 7).

    What the base model itself says of the two answers is computed once, at the start, and stays on the client.
    """

    beta: float = Field(default=0.1, gt=0, le=10)
    """How strongly a change of an answer's log-probability counts; larger keeps nearer to the base model."""

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """What the base model might say of the answers, float32, shape (count, 2)."""
        return generator.standard_normal((count, 2)).astype(np.float32)

    def prepare(self, model: "AdapterModel", encoded: "Encoded") -> "Encoded":
        """The log-probabilities that the base model gives both answers, as the labels."""
        return replace(encoded, labels=reference_scores(model, encoded))

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The log-probabilities of both answers in nats, shape (pairs, 2)."""
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return log_likelihood(found, batch["targets"])[0].view(-1, 2)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """How surprising the preference is, in nats."""
        from torch.nn import functional as F

        gains = self.beta * (scores - labels)
        return F.softplus(gains[:, 1] - gains[:, 0])

    def places(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The implicit reward of each answer; the first one is right."""
        return self.beta * (scores - labels)[:, None], scores.new_zeros((len(scores), 1)).long()

    def metrics(self, scores: "torch.Tensor", labels: "torch.Tensor") -> dict[str, float]:
        """By how much the preferred answer's reward is larger, added up."""
        return {"n": float(len(scores)), "margin": float((scores[:, 0] - scores[:, 1]).double().sum())}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The mean margin."""
        return {"margin": sums["margin"] / max(1.0, sums["n"])}


class ORPO(_Pairs):
    """The preferred one of two answers, learned together with the odds between them (Hong et al., EMNLP 2024, ORPO).

    It needs no reference model.
    """

    weight: float = Field(default=0.1, ge=0, le=10)
    """Weight of the odds beside the likelihood of the preferred answer; lambda of the paper."""

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The mean log-probability of a token of both answers, shape (pairs, 2)."""
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, count = log_likelihood(found, batch["targets"])
        return (total / count.clamp(min=1)).view(-1, 2)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Negative log-likelihood of the preferred answer and the weighted odds ratio (equations 6 and 7), in nats."""
        import torch
        from torch.nn import functional as F

        # A model that is sure of a whole answer has log-probability 0, whose odds are infinite.
        sure = scores.clamp(max=-1e-6)
        odds = sure - torch.log(-torch.expm1(sure))
        return self.weight * F.softplus(odds[:, 1] - odds[:, 0]) - scores[:, 0]


class Reward(_Pairs):
    """A number for each answer to a prompt, larger for the preferred one (Bradley and Terry, 1952): a reward model."""

    traits: ClassVar[Traits] = replace(
        _PAIRS, model="AutoModelForSequenceClassification", peft="SEQ_CLS", generates=False, beside=False
    )

    def configure(self, config: Any) -> None:
        """One output."""
        config.num_labels = 1

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The reward of both answers, shape (pairs, 2)."""
        found: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return found.view(-1, 2)
