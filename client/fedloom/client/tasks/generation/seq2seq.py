"""A text that is written in answer to another one, by a model with an encoder and a decoder."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedloom.client.data.rows import IGNORED
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers, Column
from fedloom.core.errors import ModelError

if TYPE_CHECKING:
    import torch

    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices, Rows

__all__ = ["Seq2Seq", "read_before"]


class Seq2Seq(Task):
    """A text written in answer to another one, such as a summary or a translation, by a model like T5 or BART."""

    traits: ClassVar[Traits] = Traits(
        "prompt and completion",
        "AutoModelForSeq2SeqLM",
        "SEQ_2_SEQ_LM",
        labels=False,
        generates=True,
        per_token=True,
        decoder=True,
        holds=("prompts",),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """What is read, and what is to be written."""
        return "prompt", "completion"

    def read(self, cells: "Cells") -> "Record":
        """What is read, and what is to be written."""
        prompt, completion = cells.completed()
        if not prompt.strip():
            raise cells.fault(f"has an empty {cells.name('prompt')}; fill it in or remove the row")
        return cells.filled(prompt + completion, prompt=prompt)

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """What is read; the rest of the text is to be written."""
        return {"prompts": tuple(record.prompt for record in records)}

    def document(self, rows: "Rows", index: int) -> dict[str, Any]:
        """What is read, and what is to be written."""
        text, prompt = rows.texts[index], rows.prompts[index]
        return {"prompt": prompt, "completion": text[len(prompt) :]}

    def sample(self, index: int) -> Mapping[str, object]:
        """The end of a made-up text, to be written from its beginning."""
        words = made_up_text(index).split()
        return {"prompt": " ".join(words[:2]), "completion": " ".join(words[2:])}

    def encode(self, rows: "Rows", tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The prompt's ids, and as targets those of what is to be written, as long as that is."""
        written = [text[len(prompt) :] for text, prompt in zip(rows.texts, rows.prompts, strict=True)]
        given = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        read = tokenizer(list(rows.prompts), **given)["input_ids"]
        wanted = tokenizer(text_target=written, **given)["input_ids"]
        for ids, targets in zip(read, wanted, strict=True):
            yield np.asarray(ids, np.int32), np.asarray(targets, np.int32)

    def scores(self, model: Any, batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """At each token of what is written, given what is read and the tokens before it."""
        scores: torch.Tensor = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=read_before(batch["labels"], model.config),
        ).logits
        return scores


def read_before(labels: "torch.Tensor", config: Any) -> "torch.Tensor":
    """What the decoder has read at each place: a start token and then the labels; padding is hidden from all before."""
    import torch

    first = getattr(config, "decoder_start_token_id", None)
    if first is None:
        raise ModelError("its config.json has no decoder_start_token_id, which what is written begins with; add it")
    start = torch.full_like(labels[:, :1], int(first))
    known = labels.masked_fill(labels == IGNORED, int(config.pad_token_id or 0))
    return torch.cat([start, known[:, :-1]], 1)
