"""From the run's [adapter] and [model] sections to a PeftModel and its slots."""

import warnings

from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.adapters import bias, head, lora
from fedloom.client.adapters.api import Slot
from fedloom.proto.run import AdapterSection

__all__ = ["attach"]

TASK_TYPES = {"text-classification": "SEQ_CLS"}
"""PEFT's name of each task; for SEQ_CLS it saves the classification head with the adapter."""


def attach(base: PreTrainedModel, section: AdapterSection, task: str) -> tuple[PeftModel, list[Slot]]:
    """The base model with its adapter, everything frozen, and the slots in wire order.

    Raises:
        ModelError: The base model has no layer of a target name.
    """
    task_type = TASK_TYPES[task]
    with warnings.catch_warnings():
        # transformers 5 deprecates an attribute that peft still reads; nothing a user can act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        if section.kind == "bias":
            model = bias.attach(base, section, task_type)
            slots = bias.slots(model)
        elif section.kind == "lora":
            model = lora.attach(base, section, task_type)
            slots = lora.slots(model)
        else:
            # A rank-1 pair whose B stays zero: PEFT has no head-only kind, and this one loads anywhere.
            model = lora.attach(base, section.model_copy(update={"rank": 1}), task_type)
            slots = []
    model.requires_grad_(False)
    return model, slots + head.slots(model)
