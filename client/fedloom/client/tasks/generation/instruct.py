"""The assistant's turns of a conversation, in the base model's chat template."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedloom.client.data.rows import IGNORED, Indices, Rows
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record

__all__ = ["Instruct"]


class Instruct(Task):
    """The assistant's turns of a conversation, in the base model's chat template."""

    traits: ClassVar[Traits] = Traits(
        "messages, or prompt and completion",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        labels=False,
        generates=True,
        per_token=True,
        chat=True,
        holds=("turns",),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A conversation, or one question and its answer."""
        return ("prompt", "completion") if present & {"prompt", "completion"} else ("messages",)

    def read(self, cells: "Cells") -> "Record":
        """The turns of a conversation."""
        if "completion" in cells.needed:
            prompt, completion = cells.completed()
            asked = (("user", prompt), ("assistant", completion))
            return cells.filled(prompt + completion, prompt=prompt, turns=asked)
        turns = cells.turns()
        return cells.filled("".join(content for _, content in turns), turns=turns)

    def columns(self, records: "Sequence[Record]", classes: Sequence[Indices], answers: Answers) -> Mapping[str, Any]:
        """Turns, and which of them are learned."""
        return {"turns": tuple(record.turns for record in records), "answers": answers}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """The turns."""
        return {"messages": [{"role": role, "content": content} for role, content in rows.turns[index]]}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up answer to one question."""
        return {"prompt": "What happened?", "completion": made_up_text(index)}

    def encode(self, rows: Rows, tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The next token's id at each token before one that an assistant's turn begins or goes on with."""
        from fedloom.client.data.chat import learned_spans

        texts, spans = zip(*(learned_spans(turns, tokenizer, rows.answers) for turns in rows.turns), strict=True)
        # The template has written the special tokens already.
        output = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for whole, places, parts in zip(output["input_ids"], output["offset_mapping"], spans, strict=True):
            ids = np.asarray(whole[:max_length], np.int32)
            learned = [any(begin < stop and start < end for begin, end in parts) for start, stop in places[: len(ids)]]
            targets = np.full(len(ids), IGNORED, np.int32)
            targets[:-1] = np.where(learned[1:], ids[1:], IGNORED)
            yield ids, targets
