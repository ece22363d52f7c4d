"""From the run's [adapter] and [model] sections to a PeftModel and its slots."""

import warnings

from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.adapters import bias, head, lora
from fedloom.client.adapters.api import Slot
from fedloom.client.adapters.head import Head
from fedloom.core.config.run import AdapterSection, Task
from fedloom.core.errors import ModelError

__all__ = ["attach"]

TASK_TYPES: dict[Task, str | None] = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
    "instruct": "CAUSAL_LM",
    "image-classification": None,
}
"""PEFT's name of each task; for the first two it saves the classification head with the adapter. It has none for
pictures, and its names for texts would hand the model arguments that it does not take."""


def attach(base: PreTrainedModel, section: AdapterSection, task: Task, of_task: Head) -> tuple[PeftModel, list[Slot]]:
    """The base model with its adapter, everything frozen, and the slots in wire order, those of the head last.

    Raises:
        ModelError: The base model has no layer of a target name, or nothing that this kind of adapter trains.
    """
    task_type = TASK_TYPES[task]
    with warnings.catch_warnings():
        # transformers 5 deprecates an attribute that peft still reads; nothing a user can act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        if section.kind == "bias":
            model = bias.attach(base, section, task_type, of_task)
            slots = bias.slots(model)
        elif section.kind == "lora":
            model = lora.attach(base, section, task_type, of_task)
            slots = lora.slots(model)
        else:
            # A rank-1 pair whose B stays zero: PEFT has no head-only kind, and this one loads anywhere.
            model = lora.attach(base, section.model_copy(update={"rank": 1}), task_type, of_task)
            slots = []
    model.requires_grad_(False)
    slots += head.slots(model, of_task)
    if not slots:
        raise ModelError(f"{type(base).__name__} has nothing that adapter.kind = {section.kind!r} trains; use 'lora'")
    return model, slots
