"""Bias tuning: every bias vector of the base model moves, nothing else (BitFit, Ben Zaken et al., ACL 2022).

A bias travels as its change, so the coordinator needs no base model to start it at zero. PEFT has no kind
of its own for this; a rank-1 LoRA whose B stays zero carries the biases in an ordinary PEFT adapter.
"""

from typing import ClassVar

from peft import PeftModel

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets, carrier
from fedloom.client.adapters.numbered_layers import Layers, in_layers
from fedloom.client.adapters.slot import Slot, schema_name
from fedloom.core.config.parsing import Section
from fedloom.core.peft_settings import PREFIX
from fedloom.core.schema import Role, TensorSpec

__all__ = ["Bias"]


class Bias(Section):
    """Every bias vector of the base model but the head's."""

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True)
    targets: Targets = "auto"
    """Layers that PEFT's carrier sits on; they are not trained."""
    layers: Layers = None
    """Numbers of the transformer layers whose biases move: 0 is the first, -1 the last. None: all of the model's."""

    def attach(self, host: Host) -> PeftModel:
        """A PeftModel that saves all biases.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return carrier(host, self.targets, bias="all", layers=self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """Every bias of the base model but the head's, in model order."""
        found: list[Slot] = []
        base = model.get_base_model()
        chosen = set(in_layers(base, self.layers, (name for name, _ in base.named_parameters())))
        for name, parameter in model.named_parameters():
            is_head = "modules_to_save" in name or ".original_module." in name
            inside = name.removeprefix(PREFIX) in chosen
            if inside and not is_head and name.endswith(".bias"):
                key = schema_name(name)
                module = key.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
                spec = TensorSpec(key, module, Role.BIAS, tuple(parameter.shape))
                found.append(Slot(spec, parameter, origin=parameter.detach().clone()))
        return found

    def merge(self, model: PeftModel) -> None:
        """Nothing: the biases are the base model's own."""
