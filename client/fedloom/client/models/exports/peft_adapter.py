"""The result as an ordinary Hugging Face PEFT adapter."""

import json
import warnings
from pathlib import Path
from typing import Any

from fedloom.client.adapters.spectral.lora_start import taken_out
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.card import outputs, write_card
from fedloom.client.models.exports.wide_adapter import widen
from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ModelError
from fedloom.core.model_card import Form
from fedloom.core.runtime.export_folder import replace_export

__all__ = ["save_adapter"]

_WHAT = "A PEFT adapter trained with fedloom."

_LOADING = """from transformers import {kind}
from peft import PeftModel

base = {kind}.from_pretrained("BASE"{arguments})
model = PeftModel.from_pretrained(base, "THIS FOLDER")"""


def save_adapter(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write the adapter the model holds now: PEFT's files, a card, and `facts` as fedloom.json.

    An adapter that is in the folder is replaced by a whole one or not at all, see `replace_export`.

    What the model adds to the frozen weights is in it, see `widen`.

    Raises:
        ModelError: PEFT does not know the kind of the adapter.
        ConfigError: The folder holds other files, is the one this process runs in, or cannot be written.
    """
    if not model.adapter.traits.peft:
        raise ModelError(
            f"PEFT does not know the adapter kind {type(model.adapter).__name__}; export with format "
            f"{model.adapter.traits.result} or safetensors"
        )
    replace_export(folder, lambda draft: _write(model, draft, facts))


def _write(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """All of an adapter's files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft cannot find a model card for a base model in a local folder
        model.model.save_pretrained(str(folder), safe_serialization=True)
    if corrections := model.corrections or taken_out(model.slots.values()):
        widen(folder, corrections)
    _settle(folder / "adapter_config.json", facts.get("base"))
    kind, arguments = model.task.traits.model, outputs(model.model.get_base_model(), model.task)
    if model.head.resized:
        arguments += ", ignore_mismatched_sizes=True"  # the base model's own head is for other labels
    method = str(read_json(folder / "adapter_config.json").get("peft_type", "peft")).lower()
    loading = _LOADING.format(kind=kind, arguments=arguments)
    write_card(folder, Form("peft", ("peft", method), _WHAT, loading), model.task, facts)


def _settle(path: Path, base: str | None) -> None:
    """Make equal adapters equal files: targets, which PEFT keeps as a set, in order, and the run's name for the base.

    PEFT puts the folder there from which this machine has loaded it, which is nobody else's.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    if base is not None:
        settings["base_model_name_or_path"] = base
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            settings[key] = sorted(value)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
