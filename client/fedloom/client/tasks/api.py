"""What a task is: the columns of a row, what a model reads and must answer, its loss, and which answers are right.

A component of the entry-point group `fedloom.tasks`: a subclass of `Task`, whose fields are keys of [model]. Reading
rows needs no torch, and neither do the rules that a run file is checked by.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedloom.core import registry
from fedloom.core.config.file_format import Answers, Column
from fedloom.core.config.parsing import Section

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows
    from fedloom.client.data.tokens import Encoded
    from fedloom.client.eval.text_figures import Written
    from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["Ids", "Task", "Traits", "made_up_text", "task_named"]

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Traits:
    """What holds for a task whatever its options."""

    columns: str
    """The columns of a row, in words."""
    model: str
    """Name of transformers' class that loads a base model for it, such as AutoModelForSequenceClassification."""
    peft: str | None = None
    """PEFT's name of the task, with which it saves the head of itself; None where it has none."""
    labels: bool = True
    """model.labels names its classes."""
    generates: bool = False
    """It predicts tokens with the base model's own output layer: there is no head to train."""
    per_token: bool = False
    """There is a label at each token, not one for each row."""
    images: bool = False
    """Rows are images."""
    audio: bool = False
    """Rows are recordings."""
    chat: bool = False
    """Rows are conversations in the tokenizer's chat template."""
    headless: bool = False
    """It reads the base model itself: there is no head to train."""
    decoder: bool = False
    """One part of the model reads the text, and another one writes what is learned."""
    sequences: int = 1
    """Sequences that the model reads of each row: two where it compares them."""
    beside: bool = False
    """`encode`'s targets go to `scores` beside the labels of the rows, in place of being the labels."""
    several: bool = False
    """A row has any number of the labels at once."""
    usual: bool = False
    """Rows are taken to be for it where only their columns tell, and other tasks have the same."""
    holds: tuple[str, ...] = ()
    """Columns of `Rows` that its rows fill, beside texts, labels and groups."""

    @property
    def writes(self) -> bool:
        """Whether it writes text, which `evaluation.generate` has it do; a loss is then that of one token."""
        return self.generates and self.per_token

    @property
    def media(self) -> bool:
        """Whether rows are files, such as images; otherwise they are texts."""
        return self.images or self.audio


class Task(Section):
    """A task with its options. The defaults here are those of one text and one class for each row."""

    traits: ClassVar[Traits]
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the model's outputs."""
    max_length: int = Field(default=64, ge=8, le=8192)
    """Tokens kept of each text; its end is cut off."""

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """The columns a row must have; where a task has two layouts, `present` tells them apart."""
        return "text", "label"

    def read(self, cells: "Cells") -> "Record":
        """One row as it was written, checked.

        Raises:
            DataError: It does not fit; the message names the place and the remedy, and never quotes the row.
        """
        return cells.filled(cells.string("text"), label=cells.label())

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """The columns of `Rows` beyond texts, groups and places.

        Args:
            records: All rows.
            classes: For each row the positions of its labels in `labels`; empty where the task has no classes.
            answers: Which turns of a conversation are learned.
        """
        return {"labels": np.concatenate(classes)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """One row as it would be written: what `read` makes the same row of."""
        return {"text": rows.texts[index], "label": rows.label_names[rows.labels[index]]}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up row with any label, for checks that need some."""
        return {"text": made_up_text(index), "label": self.labels[index % len(self.labels)]}

    def reader(self, folder: Path) -> Any:
        """What turns rows into the model's numbers: the tokenizer of a base model's folder.

        Raises:
            ModelError: It has none that can be used.
        """
        from fedloom.client.models.tokenizer import load_tokenizer

        return load_tokenizer(folder)

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """Token ids of each sequence, and with `per_token` or `beside` a target at each token.

        With `per_token` targets are the class that the scores at the token must predict; with `beside` what `scores`
        makes of them. A row of several sequences gives them one after the other.

        Args:
            rows: Some rows.
            tokenizer: The model's.
            max_length: Tokens to keep, special tokens included.

        Returns:
            int32 arrays: ids, not padded, and as many targets (`IGNORED` where there is none), or none.
        """
        output = tokenizer(list(rows.texts), truncation=True, max_length=max_length, return_attention_mask=False)
        for ids in output["input_ids"]:
            yield np.asarray(ids, np.int32), np.zeros(0, np.int32)

    def configure(self, config: Any) -> None:
        """Set what of the base model's configuration the task decides, such as the number of outputs."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: index for index, name in enumerate(self.labels)}

    def adjust(self, model: Any, reader: Any) -> None:
        """Change the base model as it was loaded where `reader` gives it less than it was made for.

        Raises:
            ModelError: It cannot be changed so.
        """

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Made-up labels of rows or tokens, shape (count, ...), of the type that rows have."""
        return generator.integers(classes, size=count)

    def prepare(self, model: "AdapterModel", encoded: "Encoded") -> "Encoded":
        """Rows with what is computed once for each of them by the base model, before anything is trained.

        Args:
            model: The base model, with an adapter that adds nothing to it. It is left as it is.
            encoded: The rows. What is computed for one may depend on no other.
        """
        return encoded

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """What the model says of each example of a batch: no example's scores may depend on another.

        Args:
            model: Called as models of transformers are.
            batch: As `collate` makes it, on the model's device: the model's inputs, labels, and with `beside` targets.

        Returns:
            Shape (batch, outputs), or (batch, length, outputs) with `per_token`; in whatever shape `loss` takes it.
        """
        inputs = {name: each for name, each in batch.items() if name != "labels"}
        # Not every model brings a spectrogram or a wave to the precision of its weights.
        inputs |= {name: each.to(model.dtype) for name, each in inputs.items() if each.is_floating_point()}
        scores: torch.Tensor = model(**inputs).logits
        return scores

    def places(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Scores of shape (batch, places, outputs) and labels of shape (batch, places), for answers and metrics."""
        from fedloom.client.training.losses import positions

        return positions(scores, labels)

    def loss(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """The loss of each example, a function of that example alone: cross-entropy in nats.

        Args:
            scores: float32, as `scores` gives them.
            labels: Shape (batch, ...): those of the rows, or with `per_token` the targets; `IGNORED` where there is
                none.

        Returns:
            Shape (batch,). Nothing may be reduced over the batch: the noise covers what one example adds to a sum.
        """
        from fedloom.client.training.losses import per_example

        return per_example(scores, labels)

    def answer(self, scores: "torch.Tensor") -> "torch.Tensor":
        """What scores of shape (..., outputs) say, shape (...): the class with the largest."""
        return scores.argmax(-1)

    def right(self, scores: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Which answers count as right.

        Args:
            scores: Shape (batch, places, outputs).
            labels: Shape (batch, places).

        Returns:
            bool, shape (batch, places).
        """
        return self.answer(scores) == labels

    def metrics(self, scores: "torch.Tensor", labels: "torch.Tensor") -> dict[str, float]:
        """Further sums over the labelled places of some rows, which add up over all of them.

        Args:
            scores: Shape (places, outputs).
            labels: Shape (places,).
        """
        return {}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What the sums of `metrics` over all rows come to, by name."""
        return {}

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Figures that do not add up over rows, such as an area under a curve, by name.

        Args:
            scores: float32, those of all labelled places of all rows, shape (places, outputs).
            labels: Shape (places,).
            rows: Which row each place is of, shape (places,): those of a row lie together, in their order.
        """
        return {}

    def report_written(self, pairs: "Sequence[Written]") -> dict[str, float]:
        """Figures of texts that the model wrote, by name: ROUGE, and the share that is as wanted.

        Args:
            pairs: What was wanted and what was written, at least one.

        Raises:
            ConfigError: The package that computes them is missing.
        """
        from fedloom.client.eval.text_figures import text_figures

        return text_figures(pairs)


_SAMPLES = ("the ward was quiet", "a long walk by the river in spring", "ten past nine", "nobody knew the answer yet")


def made_up_text(index: int) -> str:
    """One of four texts that nobody wrote."""
    return _SAMPLES[index % len(_SAMPLES)]


def task_named(
    name: str,
    labels: tuple[str, ...] = (),
    max_length: int = 64,
    image_size: int | None = None,
    audio_seconds: int | None = None,
) -> Task:
    """The installed task of this name, with those of these options that it has.

    Raises:
        ConfigError: There is none, or it cannot be loaded.
    """
    given = {"labels": labels, "max_length": max_length, "image_size": image_size, "audio_seconds": audio_seconds}
    return _made(registry.load("tasks", name), name, tuple(given.items()))


@functools.lru_cache(maxsize=256)
def _made(kind: object, name: str, given: tuple[tuple[str, Any], ...]) -> Task:
    # By the class too: in a notebook, which defines a class anew, a name does not stand for the same one for long.
    known = registry.options_model("tasks", name).model_fields
    made: Task = registry.build("tasks", name, {key: value for key, value in given if key in known})
    return made
