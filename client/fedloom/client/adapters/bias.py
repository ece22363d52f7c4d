"""Bias tuning: every bias vector of the base model moves, nothing else (BitFit, Ben Zaken et al., ACL 2022).

A bias travels as its change, so the coordinator needs no base model to start it at zero. PEFT has no kind
of its own for this; a rank-1 LoRA whose B stays zero carries the biases in an ordinary PEFT adapter.
"""

from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.adapters import lora
from fedloom.client.adapters.api import Slot, schema_name
from fedloom.client.adapters.head import Head
from fedloom.core.config.run import AdapterSection
from fedloom.core.schema import Role, TensorSpec

__all__ = ["attach", "slots"]


def attach(base: PreTrainedModel, section: AdapterSection, task_type: str | None, head: Head) -> PeftModel:
    """A PeftModel that saves all biases.

    Raises:
        ModelError: No layer has one of the target names (the carrier needs one).
    """
    return lora.attach(base, section.model_copy(update={"rank": 1}), task_type, head, bias="all")


def slots(model: PeftModel) -> list[Slot]:
    """Every bias of the base model but the head's, in model order."""
    found: list[Slot] = []
    for name, parameter in model.named_parameters():
        is_head = "modules_to_save" in name or ".original_module." in name
        if not is_head and name.endswith(".bias"):
            key = schema_name(name)
            module = key.removeprefix("base_model.model.").removesuffix(".bias").removesuffix(".base_layer")
            spec = TensorSpec(key, module, Role.BIAS, tuple(parameter.shape))
            found.append(Slot(spec, parameter, origin=parameter.detach().clone()))
    return found
