"""The task head: the layer that the base model does not have. Its start value travels with the adapter."""

from peft import PeftModel

from fedloom.client.adapters.api import Slot, schema_name
from fedloom.proto.schema import Role, TensorSpec

__all__ = ["slots"]


def slots(model: PeftModel) -> list[Slot]:
    """The parameters of the modules that PEFT saves whole (modules_to_save), in model order."""
    found: list[Slot] = []
    for name, parameter in model.named_parameters():
        if ".modules_to_save.default." in name:
            key = schema_name(name)
            module = key.removeprefix("base_model.model.").rpartition(".")[0]
            found.append(Slot(TensorSpec(key, module, Role.HEAD, tuple(parameter.shape)), parameter))
    return found
