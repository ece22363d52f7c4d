"""A text about a picture, by a small vision-language model."""

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedloom.client.data.rows import IGNORED, Rows, picture
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.client.tasks.generation.completions import completion_tokens
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record
    from fedloom.client.data.rows import Indices

__all__ = ["ImageText"]


class ImageText(Task):
    """A text about a picture, such as an answer or a report, by a small vision-language model such as LLaVA.

    The picture comes first, then the prompt; the completion is learned. `max_length` counts the places of the picture
    too.
    """

    traits: ClassVar[Traits] = Traits(
        "image, prompt and completion",
        "AutoModelForImageTextToText",
        labels=False,
        generates=True,
        per_token=True,
        images=True,
        holds=("images", "parts"),
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """A picture, what is asked of it, and the answer."""
        return "image", "prompt", "completion"

    def read(self, cells: "Cells") -> "Record":
        """A picture, as the bytes of its file, what is asked of it, and the answer."""
        prompt, completion = cells.completed()
        return cells.filled(prompt + completion, image=cells.bytes("image"), parts=(prompt, completion))

    def columns(self, records: "Sequence[Record]", classes: "Sequence[Indices]", answers: Answers) -> Mapping[str, Any]:
        """Pictures, and the texts about them."""
        return {"images": tuple(each.image for each in records), "parts": tuple(each.parts for each in records)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """The path of the picture's file, what is asked of it, and the answer."""
        prompt, completion = rows.parts[index]
        return {"image": picture(index), "prompt": prompt, "completion": completion}

    def sample(self, index: int) -> Mapping[str, object]:
        """A picture of noise, and a made-up text about it."""
        from fedloom.client.data.media.images import noise_picture

        return {"image": noise_picture(index), "prompt": "What is it?", "completion": made_up_text(index)}

    def reader(self, folder: Path) -> Any:
        """How the pictures and texts of a base model's folder are prepared."""
        from fedloom.client.data.media.vision_language import vision_language_reader

        return vision_language_reader(folder)

    def encode(self, rows: Rows, tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """The picture's places and the text; the next token's id at each token before one beyond the prompt."""
        before, prompts = tokenizer.prefix, [prompt for prompt, _ in rows.parts]
        texts = [prompt + completion for prompt, completion in rows.parts]
        found = completion_tokens(texts, prompts, tokenizer.tokenizer, max_length, special=False)
        for prompt, (ids, targets) in zip(prompts, found, strict=True):
            places = np.full(len(before), IGNORED, np.int32)
            places[-1] = IGNORED if prompt else ids[0]
            whole, learned = np.concatenate([before, ids])[:max_length], np.concatenate([places, targets])[:max_length]
            learned[-1] = IGNORED  # at the cut, the last place has nobody to predict
            yield whole, learned
