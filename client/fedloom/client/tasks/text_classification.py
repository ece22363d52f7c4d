"""One label for each text."""

from typing import ClassVar

from fedloom.client.tasks.api import Task, Traits

__all__ = ["TextClassification"]


class TextClassification(Task):
    """One label for each text."""

    traits: ClassVar[Traits] = Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS")
