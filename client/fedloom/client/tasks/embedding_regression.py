"""A vector for each text, near the one that a public teacher gives."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedloom.client.tasks.api import Task, Traits, made_up_text
from fedloom.client.tasks.sentence_embedding import mean_of_tokens
from fedloom.core.config.file_format import Answers, Column
from fedloom.core.errors import DataError

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows
    from fedloom.client.data.tokens import Encoded
    from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["EmbeddingRegression"]


class EmbeddingRegression(Task):
    """A vector for each text, learned from `vector`, the numbers that a public teacher gives for it.

    Knowledge distillation of embeddings (Reimers and Gurevych, EMNLP 2020, section 2): with M the teacher, N the mean
    of the model's tokens and d numbers in a vector, the loss of a text x is |N(x) - M(x)|^2 / d. A text may also be a
    translation of the one that its vector is of. The teacher is asked beforehand, by the owner of the rows.
    """

    traits: ClassVar[Traits] = Traits(
        "text and vector, a list of numbers", "AutoModel", "FEATURE_EXTRACTION", labels=False, headless=True
    )
    tolerance: float = Field(default=0.1, gt=0)
    """A vector whose cosine to the teacher's is within this of 1 counts as right."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A text, and the teacher's vector."""
        return "text", "vector"

    def read(self, cells: "Cells") -> "Record":
        """A text, and the teacher's vector."""
        return cells.filled(cells.string("text"), vector=cells.vector())

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """The vectors, float32, shape (n, d).

        Raises:
            DataError: They are of several lengths.
        """
        found = [np.asarray(record.vector, np.float32) for record in records]
        for record, vector in zip(records, found, strict=True):
            if len(vector) != len(found[0]):
                raise DataError(
                    f"{record.where} has a vector of {len(vector)} numbers, and {records[0].where} one of "
                    f"{len(found[0])}; give all rows the vectors of one teacher"
                )
        return {"labels": np.stack(found)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A text, and the teacher's vector."""
        return {"text": rows.texts[index], "vector": rows.labels[index].tolist()}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up text, and a vector of four numbers."""
        return {"text": made_up_text(index), "vector": [1.0, -0.5, 0.25, float(index % 3)]}

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Standard normal numbers, as many for each as the model's vectors have, float32."""
        return generator.standard_normal((count, classes)).astype(np.float32)

    def prepare(self, model: "AdapterModel", encoded: "Encoded") -> "Encoded":
        """The rows as they are.

        Raises:
            DataError: The model gives vectors of another length. That is the teacher's, and says nothing of a row.
        """
        given, own = encoded.labels.shape[1], int(model.model.config.hidden_size)
        if given != own:
            raise DataError(
                f"the rows have vectors of {given} numbers, and the base model gives vectors of {own}; take a teacher "
                f"of {own}, a base model of {given}, or bring the teacher's to {own} by PCA"
            )
        return encoded

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The vector of each text, shape (batch, d): the mean of its tokens."""
        return mean_of_tokens(model, batch)

    def places(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The cosine of each vector to the teacher's, and 1, which it should be."""
        from torch.nn import functional as F

        cosines = F.cosine_similarity(scores, labels)[:, None]
        return cosines[..., None], cosines.new_ones(cosines.shape)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Squared distance of each vector to the teacher's, over how many numbers it has."""
        return (scores - labels).square().mean(1)

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """The cosine itself."""
        return scores.squeeze(-1)

    def right(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Whether it is within `tolerance` of 1."""
        return (self.answer(scores) - labels).abs() <= self.tolerance

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Mean cosine to the teacher's vectors."""
        return {"cosine": float(scores.mean())}
