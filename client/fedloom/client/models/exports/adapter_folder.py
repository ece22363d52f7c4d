"""An adapter that neither PEFT knows nor the base model's weights can take up: tensors and options, and no code.

Its folder has adapter.safetensors, the tensors by the names of the run's schema; adapter.json, the kind's name and
options, as [adapter] has them; fedloom.json and a card.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.attach import adapter_of, attach, scale_of
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.card import write_card
from fedloom.client.models.load import load_base
from fedloom.client.models.quantization import keep_float32, loading
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import Task
from fedloom.client.training.device import prepare_device
from fedloom.core import registry
from fedloom.core.config.parsing import Section, parse, read_json
from fedloom.core.config.run import AdapterSection
from fedloom.core.errors import ConfigError, ModelError, SchemaError
from fedloom.core.model_card import Form
from fedloom.core.runtime.export_folder import replace_export
from fedloom.core.tensor_file import TENSORS, tensor_file

__all__ = ["is_folder", "load_folder", "save_folder"]

_OPTIONS = "adapter.json"

_WHAT = "An adapter trained with fedloom, of a kind that PEFT does not know and that weights cannot take up."

_LOADING = """import fedloom.api as fl

model = fl.load_adapter("THIS FOLDER", base="BASE")"""

_NOTES = """The model is one of transformers, in evaluation mode; its tokenizer is the base model's. What was trained is
in `adapter.safetensors`, the kind and its options in `adapter.json`. Another run with the same `[adapter]` goes on from
this folder with `[start]`.
"""


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such an adapter."""
    return (folder / _OPTIONS).is_file()


def _write(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write the adapter that the model holds now into a folder that is there.

    Raises:
        ConfigError: The kind is installed nowhere, so that nothing could load it by its name.
    """
    assert isinstance(model.adapter, Section)  # as its conformance battery demands
    if (kind := registry.name_of("adapters", model.adapter)) is None:
        raise ConfigError(
            f"{type(model.adapter).__name__} is not installed, and its export would name it; install it, in a package "
            "that registers it under the entry-point group fedloom.adapters"
        )
    tensors = model.read(model.schema)
    (folder / TENSORS).write_bytes(tensor_file(tensors, model.schema, facts))
    options = {"kind": kind, **model.adapter.model_dump(mode="json", exclude_none=True)}
    (folder / _OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    write_card(folder, Form("fedloom", (kind,), _WHAT, _LOADING, notes=_NOTES), model.task, facts)


def save_folder(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write the adapter that the model holds now as tensors and options.

    The folder is written as by `save_adapter`.

    Raises:
        ModelError: PEFT knows the kind, or it can be merged: then others can load it too.
        ConfigError: As by `save_adapter`, or the kind is installed nowhere.
    """
    if (usual := model.adapter.traits.result) != "fedloom":
        raise ModelError(
            f"format fedloom is for adapters that only fedloom can load, and {type(model.adapter).__name__} is none; "
            f"export with format {usual} or safetensors"
        )
    replace_export(folder, lambda draft: _write(model, draft, facts))


def load_folder(base: Path, folder: Path, task: Task, compute: ComputePolicy) -> PreTrainedModel:
    """The base model with the adapter of a folder, in evaluation mode.

    Args:
        base: The base model's folder.
        folder: The adapter's.
        task: What it was trained for.
        compute: Where, and in what precision.

    Raises:
        ConfigError: The kind is not installed here, or refuses its options.
        ModelError: The base model cannot be loaded, or the tensors are not those of this adapter on it.
    """
    section = parse(AdapterSection, read_json(folder / _OPTIONS), source=str(folder / _OPTIONS))
    adapter = adapter_of(section)
    device = prepare_device(compute)
    plain, reader, head, _ = load_base(base, task, loading(compute, device))
    model, slots = attach(Host(plain, head, task.traits.peft), section.kind, adapter)
    keep_float32(model, slots)
    whole = AdapterModel(model, reader, slots, scale_of(section, adapter), device, task, head, adapter)
    try:
        tensors = load_file(folder / TENSORS)
        whole.schema.check(tensors)
    except (OSError, SafetensorError, SchemaError) as error:
        raise ModelError(
            f"{folder / TENSORS} is not this adapter on {base}: {error}; give the base model it was trained on, or "
            "export it again"
        ) from error
    whole.show(tensors)
    loaded: PreTrainedModel = model.unload()  # without the pairs of PEFT's that carried the head
    return loaded.eval()
