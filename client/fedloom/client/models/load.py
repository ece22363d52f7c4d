"""From a base model's folder to the resident model with its adapter."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.attach import adapter_of, attach, scale_of
from fedloom.client.adapters.head import Head, check_labels, find_head
from fedloom.client.adapters.thin_forward import thin_forward
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_checks import check_base
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.loading_context import LOCAL_ONLY, quiet, repeatable
from fedloom.client.models.quantization import check_frozen, keep_float32, loading, recompute_layers
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import Task
from fedloom.client.training.device import prepare_device
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role

__all__ = ["ON_CPU", "Base", "empty_base", "load_base", "load_model"]

ON_CPU = ComputePolicy(device="cpu")
"""For exports and for values that every party must have alike: float32 on the CPU, whatever device there is."""

_FLOAT32: Mapping[str, Any] = {"dtype": torch.float32}
_REPORTED: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What a checkpoint lacks, or has in another shape, is looked at by `find_head`."""


class Base(NamedTuple):
    """A base model as it was loaded."""

    model: PreTrainedModel
    reader: Any
    """Its tokenizer, or its `ImageProcessor`."""
    head: Head
    names: dict[int, str]
    """The label names of its checkpoint; LABEL_0 and so on where it has none."""


def load_model(model: ModelSection, adapter: AdapterSection, compute: ComputePolicy = ON_CPU) -> AdapterModel:
    """Load the base model from its local folder and attach the adapter.

    Raises:
        ConfigError: There is no such device here.
        ModelError: The folder is not a usable model, its digest is not the pinned one, a target is missing, or the
            model or adapter cannot be used as `compute` says.
    """
    folder = resolve_base(model.base)
    if model.digest is not None and (found := base_digest(folder)) != model.digest:
        raise ModelError(
            f"base model {model.base!r} has digest {found}; the run pins {model.digest}; get the same files"
        )
    device = prepare_device(compute)
    kind = adapter_of(adapter)
    check_frozen(compute, kind.traits)
    options = loading(compute, device)
    task: Task = model.built()
    base, tokenizer, head, names = load_base(folder, task, options)
    check_labels(head, names, model.labels, folder)
    if model.head == "frozen" and head.new:
        raise ModelError(
            f'model.head = "frozen" keeps the head that base model {folder} has, and it has none for {model.task} '
            f'({", ".join(head.modules)}); set model.head = "train"'
        )
    with repeatable():
        peft_model, slots = attach(Host(base, head, task.traits.peft), adapter.kind, kind)
    heads = [slot for slot in slots if slot.spec.role == Role.HEAD]
    if model.head == "frozen" and len(heads) == len(slots):
        raise ModelError(
            f'adapter.kind = {adapter.kind!r} with model.head = "frozen" trains nothing; set model.head = "train"'
        )
    if model.head == "train" and not heads:
        raise ModelError(f"{type(base).__name__} in {folder} has no head that could be trained; take another model")
    keep_float32(peft_model, slots)
    thin_forward(peft_model)
    if compute.gradient_checkpointing:
        recompute_layers(peft_model)
    return AdapterModel(peft_model, tokenizer, slots, scale_of(adapter, kind), device, task, head, kind)


def load_base(folder: Path, task: Task, options: Mapping[str, Any] = _FLOAT32) -> Base:
    """The plain base model of a local folder, and its tokenizer, or its `ImageProcessor`.

    It is in float32 unless `options` of from_pretrained say otherwise. What the checkpoint lacks is the same in every
    process.

    Raises:
        ModelError: The folder has no model for the task, its weights are not those of the model that it describes, or
            its tokenizer, its images or texts of `task.max_length` tokens do not fit the model.
    """
    base, reader, report, names = _read_base(folder, task, options)
    if not (task.traits.per_token or task.traits.media):
        # A decoder scores a text at its last token, which it finds by the id of the padding. Set now: some encoders
        # count positions by the id that they were built with.
        base.config.pad_token_id = reader.pad_token_id
    check_base(base, reader, task, folder)
    return Base(base, reader, find_head(base, report, task, folder), names)


def empty_base(folder: Path, task: Task, dtype: torch.dtype) -> Base:
    """The same without its weights: they have shapes and a type, on the meta device.

    Raises:
        ModelError: As by `load_base`, but for what only a model with weights can show.
    """
    base, reader, report, names = _read_base(folder, task, {"dtype": dtype, "device_map": {"": "meta"}})
    return Base(base, reader, find_head(base, report, task, folder), names)


def _read_base(
    folder: Path, task: Task, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any, dict[str, Any], dict[int, str]]:
    """The model, its reader, what transformers reports of its loading, and its label names."""
    reader, what = task.reader(folder), type(task).__name__
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, **LOCAL_ONLY)
            names = dict(config.id2label)
            config.use_cache = False  # keys and values of earlier calls serve generation only
            task.configure(config)
            kind, given = (
                getattr(transformers, task.traits.model),
                {"config": config, **_REPORTED, **LOCAL_ONLY, **options},
            )
            with repeatable():
                base, report = kind.from_pretrained(folder, use_safetensors=True, **given)
            task.adjust(base, reader)
    except ModelError:
        raise
    except Exception as error:  # whatever another's code makes of another's files
        if any(folder.glob("*.py")):
            raise ModelError(
                f"base model {folder} brings code of its own, which is never run, and cannot be loaded for {what} "
                "without it; take a model of a kind that transformers knows"
            ) from error
        raise ModelError(f"base model {folder} cannot be loaded for {what}: {error}") from error
    return base, reader, report, names
