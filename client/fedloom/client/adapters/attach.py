"""From the run's [adapter] section to a PeftModel and its slots."""

import warnings

from peft import PeftModel

from fedloom.client.adapters import head
from fedloom.client.adapters.api import Adapter, Host
from fedloom.client.adapters.lora import LoRA
from fedloom.client.adapters.slot import Slot
from fedloom.core.config.run import AdapterSection, Spec
from fedloom.core.errors import ModelError

__all__ = ["adapter_of", "attach", "check_private", "scale_of"]


def adapter_of(section: AdapterSection) -> Adapter:
    """The adapter kind that [adapter] names, with its options.

    Raises:
        ConfigError: There is no such kind here, or it refuses its options.
    """
    made: Adapter = section.built()
    return made


def scale_of(section: AdapterSection, adapter: Adapter) -> float:
    """The scale of every pair; of a kind without pairs, for which it means nothing, alpha over rank."""
    return adapter.scale if isinstance(adapter, LoRA) else section.alpha / section.rank


def check_private(spec: Spec) -> None:
    """Refuse a private run whose adapter kind is not for one. No model is loaded for that.

    Raises:
        ConfigError: See `adapter_of`.
        ModelError: Its kind gives no gradient of one example alone.
    """
    if spec.privacy.enabled and not adapter_of(spec.adapter).traits.private:
        raise ModelError(
            f"adapter.kind = {spec.adapter.kind!r} is not for private runs: its gradients cannot be clipped for one "
            "example at a time; choose another kind, see `fedloom components list adapters`, or set "
            "privacy.enabled = false"
        )


def attach(host: Host, kind: str, adapter: Adapter) -> tuple[PeftModel, list[Slot]]:
    """The base model with its adapter, everything frozen, and the slots in wire order, those of the head last.

    Raises:
        ModelError: The base model has no layer of a target name, or nothing that this kind of adapter trains.
    """
    with warnings.catch_warnings():
        # transformers 5 deprecates an attribute that peft still reads; nothing a user can act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = adapter.attach(host)
    heads = head.slots(model, host.head)
    taken = {slot.parameter for slot in heads}  # a head is trained whole, whatever of it the kind would train too
    slots = [slot for slot in adapter.slots(model) if slot.parameter not in taken] + heads
    model.requires_grad_(False)
    if not slots:
        raise ModelError(
            f"{type(host.base).__name__} has nothing that adapter.kind = {kind!r} trains; choose another kind, see "
            "`fedloom components list adapters`"
        )
    return model, slots
