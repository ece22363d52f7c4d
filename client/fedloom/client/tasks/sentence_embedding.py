"""A vector for each text, near that of texts that mean the same."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows

__all__ = ["SentenceEmbedding", "mean_of_tokens"]


class SentenceEmbedding(Task):
    """A vector for each text, from pairs of texts and how alike they are: `label`, from -1 to 1.

    The cosine of the two vectors, each the mean of its tokens', is to be the label (Reimers and Gurevych, EMNLP 2019,
    section 3). A pair is one example. Losses that take the other texts of a batch for unlike ones cannot be had: an
    example's loss would depend on its batch, which clipping each example's gradient does not bound.
    """

    traits: ClassVar[Traits] = Traits(
        "text, second and label, a number from -1 to 1",
        "AutoModel",
        "FEATURE_EXTRACTION",
        labels=False,
        headless=True,
        sequences=2,
        holds=("parts",),
    )
    tolerance: float = Field(default=0.1, gt=0)
    """A cosine within this of the label counts as right."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """Two texts, and how alike they are."""
        return "text", "second", "label"

    def read(self, cells: "Cells") -> "Record":
        """Two texts, and how alike they are."""
        first, second, label = cells.string("text"), cells.string("second"), cells.number()
        if not second.strip():
            raise cells.fault(f"has an empty {cells.name('second')}; fill it in or remove the row")
        if not -1 <= label <= 1:
            raise cells.fault(f"has a {cells.name('label')} beyond -1 to 1; scale the numbers to that range")
        return cells.filled(first, label=repr(label), parts=(first, second))._replace(text=f"{first}\n{second}")

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """The pairs, and how alike they are, float32."""
        labels = np.array([float(record.label) for record in records], np.float32)
        return {"labels": labels, "parts": tuple(record.parts for record in records)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """Two texts, and how alike they are."""
        first, second = rows.parts[index]
        return {"text": first, "second": second, "label": float(rows.labels[index])}

    def sample(self, index: int) -> Mapping[str, object]:
        """Two made-up texts, alike where they are the same one."""
        return {"text": made_up_text(index), "second": made_up_text(index // 2), "label": float(index % 3 - 1)}

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The ids of one text and then of the other."""
        texts = [text for pair in rows.parts for text in pair]
        output = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
        for ids in output["input_ids"]:
            yield np.asarray(ids, np.int32), np.zeros(0, np.int32)

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Numbers from -1 to 1, float32."""
        return generator.uniform(-1, 1, count).astype(np.float32)

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The cosine of each pair, shape (pairs, 1)."""
        from torch.nn import functional as F

        means = mean_of_tokens(model, batch)
        first, second = means.view(-1, 2, means.shape[-1]).unbind(1)
        return F.cosine_similarity(first, second)[:, None]

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Squared error of each cosine."""
        return (scores[:, 0] - labels).square()

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """The cosine itself."""
        return scores.squeeze(-1)

    def right(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Whether it is within `tolerance`."""
        return (self.answer(scores) - labels).abs() <= self.tolerance

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Spearman's rank correlation of cosines and labels, the figure of STS benchmarks."""
        from scipy.stats import spearmanr

        if min(np.ptp(scores), np.ptp(labels)) == 0:
            return {}
        return {"spearman": float(spearmanr(scores[:, 0], labels).statistic)}


def mean_of_tokens(model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    """The vector of each sequence, float32, shape (sequences, d): the mean of what the model gives for its tokens."""
    mask = batch["attention_mask"]
    tokens = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
    means: torch.Tensor = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return means
