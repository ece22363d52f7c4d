"""The model card of a result, and fedloom.json beside it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedloom.client.tasks.api import Task
from fedloom.core.model_card import Form, Purpose, model_card

__all__ = ["outputs", "write_card"]

_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
}
"""The hub's names, by transformers' class."""


def write_card(folder: Path, form: Form, task: Task, facts: dict[str, Any]) -> None:
    """Write README.md and fedloom.json into a folder that is there."""
    card = model_card(facts, form, _purpose(task, facts))
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "fedloom.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def outputs(model: PreTrainedModel, task: Task) -> str:
    """The argument by which from_pretrained gives a base model as many outputs as this one; "" if it has them anyway.

    A base model's own configuration, or transformers' two, is right for no task with a head of its own.
    """
    return "" if task.traits.generates else f", num_labels={model.config.num_labels}"


def _purpose(task: Task, facts: dict[str, Any]) -> Purpose:
    traits = task.traits
    if traits.images:
        side = facts.get("image_size")
        reads = f"Images are brought to {f'{side} by {side} pixels' if side else 'the size of the base model'}"
    elif traits.audio:
        seconds = facts.get("audio_seconds")
        reads = f"Recordings are brought to {f'{seconds} seconds' if seconds else 'the length of the base model'}"
        reads += ": their end is cut off, or silence follows it"
        if seconds:
            reads += (
                f". A base model that reads more was cut down to {seconds} seconds, as `fedloom.api.load_adapter` does"
            )
    else:
        reads = f"Texts are cut at {task.max_length} tokens"
    name = facts.get("task", type(task).__name__)
    return Purpose(name, traits.columns, _PIPELINES.get(traits.model), reads)
