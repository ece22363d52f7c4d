"""How the files of a data set are to be read: what only their owner can say, in a policy or in a simulation's run."""

from typing import Literal

from pydantic import Field

from fedloom.core.config.parsing import Section

__all__ = ["Answers", "Column", "Form", "LabelsAs"]

Column = Literal[
    "text",
    "label",
    "group",
    "tokens",
    "tags",
    "prompt",
    "completion",
    "messages",
    "image",
    "audio",
    "question",
    "answer",
    "second",
    "chosen",
    "rejected",
    "vector",
]
"""What a task reads of a row."""

LabelsAs = Literal["names", "positions"]
"""What stands in the data for a label: its name, or its position among the label names, counted from 0."""

Answers = Literal["all", "last"]
"""Which of the assistant's turns in a conversation are learned."""


class Form(Section):
    """Part of [data]: how its files are to be read."""

    columns: dict[Column, str] = Field(default_factory=dict)
    """The files' names of columns: body for text is `text = "body"`. One left out has its own name. If it names what
    rows are about (text, tokens, prompt, messages or image), nothing else of that kind is read, whatever is asked."""
    labels_as: LabelsAs | None = None
    """Whether labels in the data are names, or positions from 0 in the list of names. None takes what fits all of them,
    and refuses data that both fit."""
    answers: Answers = "all"
    """Which of the assistant's turns in a conversation are learned. last leaves out what follows it, and takes every
    chat template; all needs one that writes a turn alike whatever follows."""
