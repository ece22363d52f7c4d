"""What an adapter kind is: options, the trained parameters that it puts into a base model, and how they come out again.

A kind is one pydantic model, registered under the entry-point group `fedloom.adapters`. Its fields are the keys of
[adapter] that it takes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.adapters.head import Head
from fedloom.client.adapters.slot import Slot

__all__ = ["Adapter", "Host", "Traits"]


@dataclass(frozen=True)
class Traits:
    """What holds for every adapter of a kind."""

    private: bool = True
    """Private runs may train it: its layers give each example's own gradient, which the sensitivity probe checks."""
    exact_average: bool = False
    """The mean of the clients' tensors is the tensor of their mean model."""
    trains_base: bool = False
    """It trains parameters of the base model itself, or makes its own of them: the base model must be in float32."""
    peft: bool = True
    """PEFT's own files hold it. Otherwise a run's result is a merged model, see `Adapter.merge`."""
    starts_as_base: bool = True
    """As it is attached the model gives what the base model gives. Otherwise it starts near it, such as by rounding."""
    merges: bool = True
    """Its values can be folded into the base model's own parameters. If not, and PEFT does not know the kind either, a
    run's result is a folder of tensors and options, see `fedloom.client.models.exports.adapter_folder`."""

    @property
    def result(self) -> Literal["peft", "merged", "fedloom"]:
        """The format of a run's result."""
        if self.peft:
            return "peft"
        return "merged" if self.merges else "fedloom"


@dataclass(frozen=True)
class Host:
    """The base model that an adapter is attached to."""

    base: PreTrainedModel
    head: Head
    """Its head, which PEFT saves with the adapter."""
    task_type: str | None
    """PEFT's name of the task; None where it has none."""


class Adapter(Protocol):
    """One kind of adapter with its options."""

    traits: ClassVar[Traits]

    def attach(self, host: Host) -> PeftModel:
        """The base model with the adapter, which leaves its outputs as they were unless the traits say otherwise.

        A kind that PEFT does not know puts its modules into `lora.carrier`, which has the head.

        Raises:
            ModelError: The base model has nothing to attach to.
        """

    def slots(self, model: PeftModel) -> list[Slot]:
        """The adapter's tensors in wire order, without the head's."""

    def merge(self, model: PeftModel) -> None:
        """Fold what PEFT does not know into the base model's own parameters, and take its modules out.

        Asked of kinds whose traits say `peft=False`; PEFT merges the rest.

        Raises:
            ModelError: The values cannot be merged; always, where the traits say `merges=False`.
        """
