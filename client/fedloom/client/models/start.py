"""An ordinary PEFT adapter as the adapter that a run begins from."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.adapters.lora import MAGNITUDE
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import RunConfig
from fedloom.core.config.start import beginning, check_digest, check_origin, needs_base, read_tensors, tensors_file
from fedloom.core.errors import ConfigError
from fedloom.core.peft_settings import lora_scale, more_than_pairs
from fedloom.core.schema import LORA, Array, Schema
from fedloom.strategies.start import starting_adapter, stored_start

__all__ = ["start_of"]


def start_of(config: RunConfig, model: AdapterModel) -> dict[str, Array]:
    """The adapter that a run begins from: a fresh one, or that of [start].

    Args:
        config: A completed run file.
        model: Its model. A bias, or a head that its checkpoint has, travels as its change of what it holds.

    Raises:
        ConfigError: [start] names no adapter that fits the run.
    """
    if config.start is None or not needs_base(config.start):
        return stored_start(config, model.schema)
    folder = Path(config.start.adapter)
    tensors = tensors_file(config.start)
    check_digest(tensors, config.start.digest)
    _check_settings(read_json(folder / "adapter_config.json"), model.schema, config.adapter.alpha)
    if (about := folder / "fedloom.json").is_file():
        check_origin(read_json(about), config.model.digest, config.model.labels)
    found, _ = read_tensors(tensors)
    fresh = starting_adapter(model.schema, config.run.seed)
    return beginning(_changes(found, model), model.schema, fresh, config.wire.broadcast)


def _check_settings(settings: dict[str, Any], schema: Schema, given: float) -> None:
    """Refuse an adapter that is more than plain pairs at the run's scale, or has magnitudes where the run has none."""
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"start.adapter is of kind {settings.get('peft_type')}; only LORA can be gone on from")
    if odd := more_than_pairs({**settings, "use_dora": False}):
        raise ConfigError(f"start.adapter has {odd}; only plain LoRA can be gone on from")
    if bool(settings.get("use_dora")) != (MAGNITUDE in schema.roles):
        raise ConfigError(
            f"start.adapter has use_dora = {json.dumps(bool(settings.get('use_dora')))}, and the run has not; set "
            "adapter.dora to the same"
        )
    scale = lora_scale(settings)
    if schema.pairs and not math.isclose(scale, schema.scale, rel_tol=1e-6):
        raise ConfigError(
            f"start.adapter has scale {scale:g} (lora_alpha over r, or its root), and the run's is {schema.scale:g}; "
            f"set adapter.alpha = {given * scale / schema.scale:g}"
        )


def _changes(found: dict[str, Array], model: AdapterModel) -> dict[str, Array]:
    """The tensors as a run has them.

    Left out is what PEFT saves beside them: the pair that only carries biases or a head, and the head's biases again.
    """
    carried = not any(slot.spec.role in LORA for slot in model.slots.values())
    changes: dict[str, Array] = {}
    for name, value in found.items():
        slot = model.slots.get(name)
        carrier = carried and (".lora_A." in name or (".lora_B." in name and not value.any()))
        if slot is None and (carrier or ".modules_to_save." in name or ".original_module." in name):
            continue
        if slot is not None and slot.origin is not None and slot.spec.shape == value.shape:
            value = value - slot.origin.to("cpu").float().numpy()
        changes[name] = value.astype(np.float32)
    return changes
