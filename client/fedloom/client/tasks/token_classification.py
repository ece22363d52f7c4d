"""One label for each word of a text, such as the kind of name that it is part of."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedloom.client.data.rows import IGNORED, Indices, Rows
from fedloom.client.tasks.api import Ids, Task, Traits, made_up_text
from fedloom.core.config.file_format import Answers, Column

if TYPE_CHECKING:
    from fedloom.client.data.cells import Cells
    from fedloom.client.data.records import Record

__all__ = ["TokenClassification"]


class TokenClassification(Task):
    """One label for each word of a text, learned at the word's first token."""

    traits: ClassVar[Traits] = Traits(
        "tokens and tags", "AutoModelForTokenClassification", "TOKEN_CLS", per_token=True, holds=("words", "tags")
    )

    def needed(self, present: Set[Column]) -> tuple[Column, ...]:
        """Words, and a label for each."""
        return "tokens", "tags"

    def read(self, cells: "Cells") -> "Record":
        """Words and as many labels."""
        words, tags = cells.words(), cells.tags()
        if len(words) != len(tags):
            raise cells.fault(f"has {len(words)} tokens and {len(tags)} tags; every token needs one tag, or null")
        return cells.filled(" ".join(words), words=words, tags=tags)

    def columns(self, records: "Sequence[Record]", classes: Sequence[Indices], answers: Answers) -> Mapping[str, Any]:
        """Words and tags."""
        return {"words": tuple(record.words for record in records), "tags": tuple(classes)}

    def document(self, rows: Rows, index: int) -> dict[str, Any]:
        """Words and the names of their labels."""
        names = [None if tag == IGNORED else rows.label_names[tag] for tag in rows.tags[index]]
        return {"tokens": list(rows.words[index]), "tags": names}

    def sample(self, index: int) -> Mapping[str, object]:
        """The words of a made-up text; labels go round."""
        words = made_up_text(index).split()
        return {"tokens": words, "tags": [self.labels[place % len(self.labels)] for place in range(len(words))]}

    def encode(self, rows: Rows, tokenizer: Any, max_length: int) -> Iterator[tuple[Ids, Ids]]:
        """A label at the first token of each word that has one."""
        words: Any = [list(words) for words in rows.words]
        output = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        for row, (ids, tags) in enumerate(zip(output["input_ids"], rows.tags, strict=True)):
            targets = np.full(len(ids), IGNORED, np.int32)
            before = None
            for place, word in enumerate(output.word_ids(row)):
                if word is not None and word != before:
                    targets[place] = tags[word]
                before = word
            yield np.asarray(ids, np.int32), targets

    def report(self, scores: npt.NDArray[Any], labels: npt.NDArray[Any], rows: "Indices") -> dict[str, float]:
        """Macro F1, Matthews' correlation, area under the ROC curve, and calibration error, over labelled words.

        Labels such as B-DRUG and I-DRUG mark entities, whose precision, recall and F1 are those of CoNLL.
        """
        from fedloom.client.eval.figures import classification_figures, entity_figures

        entities = entity_figures(scores.argmax(1), labels, rows, self.labels)
        return entities | classification_figures(scores, labels)
