"""The head alone: a linear probe, or more where the model's head has more layers."""

from typing import ClassVar

from peft import PeftModel

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.lora import Targets, carrier
from fedloom.client.adapters.slot import Slot
from fedloom.core.config.parsing import Section

__all__ = ["HeadOnly"]


class HeadOnly(Section):
    """No adapter: the task head is all that is trained."""

    traits: ClassVar[Traits] = Traits(exact_average=True)
    targets: Targets = "auto"
    """Layers that PEFT's carrier sits on; they are not trained."""

    def attach(self, host: Host) -> PeftModel:
        """A PeftModel that saves the head.

        Raises:
            ModelError: No layer has one of the target names.
        """
        return carrier(host, self.targets)

    def slots(self, model: PeftModel) -> list[Slot]:
        """None: the head's are added to those of every kind."""
        return []

    def merge(self, model: PeftModel) -> None:
        """Nothing: PEFT saves the head."""
