"""Where the tensors of an adapter lie in a model, and what they are called."""

from dataclasses import dataclass

import torch
from torch import nn

from fedloom.core.schema import TensorSpec

__all__ = ["Slot", "schema_name"]


@dataclass(frozen=True)
class Slot:
    """Where one schema tensor lives in the model."""

    spec: TensorSpec
    parameter: nn.Parameter
    origin: torch.Tensor | None = None
    """Value that the schema tensor counts from: a bias travels as its change. None counts from zero."""


def schema_name(parameter_name: str) -> str:
    """The schema's name of a PeftModel parameter: the key PEFT gives it in adapter_model.safetensors.

    >>> schema_name("base_model.model.encoder.query.lora_A.default.weight")
    'base_model.model.encoder.query.lora_A.weight'
    >>> schema_name("base_model.model.classifier.modules_to_save.default.bias")
    'base_model.model.classifier.bias'

    A bias of a layer that carries a pair keeps PEFT's infix:

    >>> schema_name("base_model.model.encoder.query.base_layer.bias")
    'base_model.model.encoder.query.base_layer.bias'

    DoRA's magnitudes are saved under their module's name:

    >>> schema_name("base_model.model.encoder.query.lora_magnitude_vector.default.weight")
    'base_model.model.encoder.query.lora_magnitude_vector'
    """
    return (
        parameter_name.replace(".modules_to_save.default.", ".")
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
        .replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    )
