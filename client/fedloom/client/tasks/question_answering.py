"""Where in a text the answer to a question begins and ends."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows
    from fedloom.client.data.tokens import Encoded
    from fedloom.client.models.adapter_model import AdapterModel

__all__ = ["QuestionAnswering"]

_FIRST, _LAST = 1, 2


class QuestionAnswering(Task):
    """Where in a text the answer to a question begins and ends, as in SQuAD.

    An empty `answer` is none, and so is one beyond `max_length`: both of its ends are then the first token. Accuracy is
    the share of ends that are right; exact_match and f1 are those of SQuAD, over tokens.
    """

    traits: ClassVar[Traits] = Traits(
        "question, text and answer",
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
        labels=False,
        beside=True,
        holds=("parts",),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A question, the text that may answer it, and the answer as it stands there."""
        return "question", "text", "answer"

    def read(self, cells: "Cells") -> "Record":
        """A question, a text and a part of the text."""
        question, text, answer = (cells.string(column) for column in ("question", "text", "answer"))
        if not question.strip():
            raise cells.fault("has an empty question; fill it in or remove the row")
        if answer not in text:
            raise cells.fault("has an answer that is no part of its text; copy it from there, or leave it empty")
        return cells.filled(text, parts=(question, answer))._replace(text=f"{question}\n{text}")

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """Questions and answers; what is learned is found when the texts are cut into tokens."""
        ends = np.zeros((len(records), 2), np.int64)
        return {"labels": ends, "parts": tuple(record.parts for record in records)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """A question, a text and the answer."""
        question, answer = rows.parts[index]
        return {"question": question, "text": rows.texts[index][len(question) + 1 :], "answer": answer}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up text, and as the answer its last word."""
        text = made_up_text(index)
        return {"question": "What is the last word?", "text": text, "answer": text.split()[-1]}

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The question and as much of the text as fits; targets mark the first and the last token of the answer."""
        questions = [question for question, _ in rows.parts]
        texts = [text[len(question) + 1 :] for text, question in zip(rows.texts, questions, strict=True)]
        output = tokenizer(
            questions, texts, truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
        )
        for row, ids in enumerate(output["input_ids"]):
            answer = rows.parts[row][1]
            begin = texts[row].index(answer)
            end = begin + len(answer)
            targets = np.zeros(len(ids), np.int32)
            spans = zip(output["offset_mapping"][row], output.sequence_ids(row), strict=True)
            inside = [
                place for place, ((start, stop), part) in enumerate(spans) if part == 1 and start < end and stop > begin
            ]
            whole = bool(answer) and bool(inside) and output["offset_mapping"][row][inside[-1]][1] >= end
            targets[inside[0] if whole else 0] |= _FIRST
            targets[inside[-1] if whole else 0] |= _LAST
            yield np.asarray(ids, np.int32), targets

    def prepare(self, model: "AdapterModel", encoded: "Encoded") -> "Encoded":
        """The answer's first and last token as the row's two labels."""
        if not encoded.beside:
            return encoded
        ends = [[int(np.argmax(row & mark > 0)) for mark in (_FIRST, _LAST)] for row in encoded.targets]
        return replace(encoded, labels=np.array(ends, np.int64).reshape(-1, 2), targets=(), beside=False)

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Of each token whether the answer begins, and ends, there: shape (batch, 2, length), padding out of reach."""
        import torch

        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        ends = torch.stack([found.start_logits, found.end_logits], 1).float()
        return ends.masked_fill(batch["attention_mask"][:, None] == 0, torch.finfo(torch.float32).min)

    def draw(self, generator: np.random.Generator, count: int, classes: int) -> npt.NDArray[Any]:
        """Two ends among the first two tokens, which every text has."""
        return generator.integers(2, size=(count, 2))

    def metrics(self, scores: "torch.Tensor", labels: "torch.Tensor") -> dict[str, float]:
        """Rows whose span is right, and the overlap of tokens with it."""
        import torch

        answers, wanted = (each.view(-1, 2) for each in (self.answer(scores), labels))
        common = torch.minimum(answers[:, 1], wanted[:, 1]) - torch.maximum(answers[:, 0], wanted[:, 0]) + 1
        lengths = (answers[:, 1] - answers[:, 0] + 1).clamp(min=0) + (wanted[:, 1] - wanted[:, 0] + 1)
        overlap = 2 * common.clamp(min=0) / lengths
        exact = (answers == wanted).all(1)
        return {"n": float(len(wanted)), "exact": float(exact.sum()), "overlap": float(overlap.double().sum())}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Shares of the rows."""
        count = max(1.0, sums["n"])
        return {"exact_match": sums["exact"] / count, "f1": sums["overlap"] / count}
