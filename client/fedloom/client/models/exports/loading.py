"""What a user gets who loads a result as its card says."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.data.tokens import Encoded, collate, microbatches
from fedloom.client.models.exports.adapter_folder import is_folder, load_folder
from fedloom.client.models.load import ON_CPU, load_base
from fedloom.client.models.quantization import loading, saved_in_float32
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import Task, task_named
from fedloom.client.training.device import on_device, prepare_device
from fedloom.client.training.losses import labelled
from fedloom.core.config.parsing import read_json

__all__ = ["is_merged", "load_exported", "predict"]

_SHORT = 8
"""Tokens that any model can read: what it was trained to read was checked before."""


def is_merged(folder: Path) -> bool:
    """Whether an export is a whole model rather than a PEFT adapter."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_exported(
    base: Path,
    adapter: Path,
    labels: int,
    task: str = "text-classification",
    image_size: int | None = None,
    compute: ComputePolicy = ON_CPU,
    audio_seconds: int | None = None,
) -> PreTrainedModel | PeftModel:
    """What a user gets who follows the card: the plain base model with the saved adapter, or the merged model.

    Args:
        base: The base model's folder.
        adapter: The adapter's, or the merged model's.
        labels: How many there are.
        task: Name of the task.
        image_size: Side of pictures in pixels; None is the base model's own.
        compute: Where, and in what precision of the frozen weights.
        audio_seconds: Seconds of a recording that are read; None is the base model's own.

    Raises:
        ModelError: The base model, or the merged one, cannot be loaded, or the adapter is not one for it.
        ConfigError: The adapter is of a kind that is not installed here.
    """
    names = tuple(f"LABEL_{index}" for index in range(labels))
    kind = task_named(task, names, _SHORT, image_size, audio_seconds)
    device = prepare_device(compute)
    options = loading(compute, device)
    if is_merged(adapter):
        return load_base(adapter, kind, options).model.to(device).eval()
    if is_folder(adapter):
        return load_folder(base, adapter, kind, compute)
    plain = load_base(base, kind, options).model.to(device)
    saved_in_float32(plain, read_json(adapter / "adapter_config.json").get("modules_to_save") or ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates an attribute that peft reads
        return PeftModel.from_pretrained(plain, str(adapter)).eval()


def predict(model: Any, task: Task, encoded: Encoded, pad_id: int) -> np.ndarray[Any, Any]:
    """What a model with the Hugging Face call convention answers, see `Task.answer`.

    Returns:
        Shape (n,), one for each row; or one for each labelled token of each row in turn.
    """
    found: dict[int, np.ndarray[Any, Any]] = {}
    with torch.inference_mode():
        for part in microbatches(np.arange(len(encoded), dtype=np.int64), encoded, encoded.evaluation_batch):
            batch = collate(encoded, part, pad_id)
            inputs = {name: on_device(value, model.device) for name, value in batch.items()}
            scores, labels = task.places(task.scores(model, inputs).cpu(), batch["labels"])
            for row, answers, places in zip(part, task.answer(scores), labelled(labels), strict=True):
                found[int(row)] = answers[places].numpy()
    return np.concatenate([found[row] for row in range(len(encoded))])
