"""LN-tuning: the weights and biases of the layer norms move, nothing else (Qi et al., 2022, arXiv 2211.08682).

RMS norms, which have a weight and no bias, are layer norms here too. Each travels as its change from the base model's
value. PEFT saves the norms whole beside a carrier, as it saves a head.
"""

from typing import ClassVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.head import Head
from fedloom.client.adapters.lora import Targets, carrier
from fedloom.client.adapters.numbered_layers import Layers, in_layers
from fedloom.client.adapters.slot import Slot, schema_name
from fedloom.client.privacy.dp_sgd.grad_sample import is_rms_norm
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError
from fedloom.core.peft_settings import PREFIX
from fedloom.core.schema import Start, TensorSpec

__all__ = ["LayerNorm", "layer_norms"]


class LayerNorm(Section):
    """LN-tuning: the weight and the bias of every layer norm of the base model but the head's.

    Trained parameters: 2 d for each norm over d values, d for an RMS norm. Their average is exact.
    """

    traits: ClassVar[Traits] = Traits(exact_average=True, trains_base=True)
    targets: Targets = "auto"
    """Layers that PEFT's carrier sits on; they are not trained."""
    layers: Layers = None
    """Numbers of the transformer layers whose norms move: 0 is the first, -1 the last. None: all of the model's."""

    def attach(self, host: Host) -> PeftModel:
        """A PeftModel that saves all layer norms.

        Raises:
            ModelError: The base model has no layer norm, or no layer has one of the target names.
        """
        if not (names := in_layers(host.base, self.layers, layer_norms(host.base, host.head, rms=True))):
            where = "" if self.layers is None else f" in adapter.layers = {list(self.layers)}"
            raise ModelError(
                f"{type(host.base).__name__} has no layer norm and no RMS norm{where} that could be trained; choose "
                "another adapter.kind, see `fedloom components list adapters`"
            )
        return carrier(host, self.targets, saved=tuple(names), layers=self.layers)

    def slots(self, model: PeftModel) -> list[Slot]:
        """The weight and the bias of every norm, in model order."""
        found: list[Slot] = []
        for name, module in model.named_modules():
            if _is_norm(type(module), rms=True) and ".modules_to_save.default" in name:
                for part, parameter in module.named_parameters():
                    key = schema_name(f"{name}.{part}")
                    plain = key.removeprefix(PREFIX).removesuffix(f".{part}")
                    spec = TensorSpec(key, plain, f"norm_{part}", tuple(parameter.shape), Start.ZERO)
                    found.append(Slot(spec, parameter, origin=parameter.detach().clone()))
        return found

    def merge(self, model: PeftModel) -> None:
        """Nothing: PEFT puts the norms that it saves in place."""


def layer_norms(base: PreTrainedModel, head: Head, *, rms: bool = False) -> list[str]:
    """Full names of the layer norms that have a weight, with `rms` RMS norms too, in model order; none of the head."""
    return [
        name
        for name, module in base.named_modules()
        if _is_norm(type(module), rms=rms)
        and getattr(module, "weight", None) is not None
        and not any(name == each or name.startswith(f"{each}.") for each in head.modules)
    ]


def _is_norm(kind: type[nn.Module], *, rms: bool) -> bool:
    return kind is nn.LayerNorm or (rms and is_rms_norm(kind))
