"""The next token of each text, or of each completion alone where the rows have prompts."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

from fedloom.client.data.rows import Indices, Rows
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.client.tasks.generation.completions import completion_tokens
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record

__all__ = ["CausalLM"]


class CausalLM(Task):
    """The next token of each text, or of each completion alone where the rows have prompts."""

    traits: ClassVar[Traits] = Traits(
        "text, or prompt and completion",
        "AutoModelForCausalLM",
        "CAUSAL_LM",
        labels=False,
        generates=True,
        per_token=True,
        holds=("prompts",),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A text, or a prompt and what follows it."""
        return ("prompt", "completion") if present & {"prompt", "completion"} else ("text",)

    def read(self, cells: "Cells") -> "Record":
        """A text, or a prompt and what follows it."""
        if "completion" not in cells.needed:
            return cells.filled(cells.string("text"))
        prompt, completion = cells.completed()
        return cells.filled(prompt + completion, prompt=prompt)

    def columns(self, records: "Sequence[Record]", classes: Sequence[Indices], answers: Answers) -> Mapping[str, Any]:
        """Prompts, which are empty where the whole text is learned."""
        return {"prompts": tuple(record.prompt for record in records)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """A text, or a prompt and its completion."""
        text, prompt = rows.texts[index], rows.prompts[index]
        return {"prompt": prompt, "completion": text[len(prompt) :]} if prompt else {"text": text}

    def sample(self, index: int) -> Mapping[str, object]:
        """A made-up text."""
        return {"text": made_up_text(index)}

    def encode(self, rows: Rows, tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The next token's id at each token before one that reaches beyond the prompt."""
        yield from completion_tokens(rows.texts, rows.prompts, tokenizer, max_length)
