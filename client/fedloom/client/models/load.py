"""From a base model's folder to the resident model with its adapter."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.attach import adapter_of, attach
from fedloom.client.adapters.head import Head, check_labels, find_head
from fedloom.client.data.images import picture_settings
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_checks import check_base
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.loading_context import quiet, repeatable
from fedloom.client.models.quantization import keep_float32, loading, recompute_layers
from fedloom.client.policy import ComputePolicy
from fedloom.client.training.device import prepare_device
from fedloom.core.config.run import AdapterSection, ModelSection, Task
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role

__all__ = ["MODELS", "ON_CPU", "TASK_TYPES", "Base", "load_base", "load_model", "load_tokenizer"]

MODELS: dict[Task, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "instruct": AutoModelForCausalLM,
    "image-classification": AutoModelForImageClassification,
}
"""The class that loads a base model for each task."""

TASK_TYPES: dict[Task, str | None] = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
    "instruct": "CAUSAL_LM",
    "image-classification": None,
}
"""PEFT's name of each task; for the first two it saves the classification head with the adapter. It has none for
pictures, and its names for texts would hand the model arguments that it does not take."""

ON_CPU = ComputePolicy(device="cpu")
"""Where simulations and exports work, whatever device there is: their results are compared."""

_FLOAT32: Mapping[str, Any] = {"dtype": torch.float32}
_HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, and no code that lies with a model is run: left open, transformers asks at the terminal."""
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
    options = loading(compute, kind.traits, device)
    base, tokenizer, head, names = load_base(
        folder, model.task, model.labels, model.image_size, options, model.max_length
    )
    check_labels(head, names, model.labels, folder)
    if model.head == "frozen" and head.new:
        raise ModelError(
            f'model.head = "frozen" keeps the head that base model {folder} has, and it has none for {model.task} '
            f'({", ".join(head.modules)}); set model.head = "train"'
        )
    with repeatable():
        peft_model, slots = attach(Host(base, head, TASK_TYPES[model.task]), adapter.kind, kind)
    heads = [slot for slot in slots if slot.spec.role == Role.HEAD]
    if model.head == "frozen" and len(heads) == len(slots):
        raise ModelError(
            f'adapter.kind = {adapter.kind!r} with model.head = "frozen" trains nothing; set model.head = "train"'
        )
    if model.head == "train" and not heads:
        raise ModelError(f"{type(base).__name__} in {folder} has no head that could be trained; take another model")
    keep_float32(peft_model, slots)
    if compute.gradient_checkpointing:
        recompute_layers(peft_model)
    return AdapterModel(peft_model, tokenizer, slots, adapter.alpha / adapter.rank, device, head, kind)


def load_base(
    folder: Path,
    task: Task,
    labels: tuple[str, ...] = (),
    image_size: int | None = None,
    options: Mapping[str, Any] = _FLOAT32,
    max_length: int = 8,
) -> Base:
    """The plain base model of a local folder, and its tokenizer, or its `ImageProcessor`.

    It is in float32 unless `options` of from_pretrained say otherwise. What the checkpoint lacks is the same in every
    process.

    Raises:
        ModelError: The folder has no model for the task, its weights are not those of the model that it describes, or
            its tokenizer, its pictures or texts of `max_length` tokens do not fit the model.
    """
    reader = picture_settings(folder, image_size) if task == "image-classification" else load_tokenizer(folder)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, **_HERE)
            names = dict(config.id2label)
            config.use_cache = False  # keys and values of earlier calls serve generation only
            if labels:
                config.id2label = dict(enumerate(labels))
                config.label2id = {name: index for index, name in enumerate(labels)}
            kind, given = MODELS[task], {"config": config, **_REPORTED, **_HERE, **options}
            with repeatable():
                base, report = kind.from_pretrained(folder, use_safetensors=True, **given)
    except Exception as error:  # whatever another's code makes of another's files
        if any(folder.glob("*.py")):
            raise ModelError(
                f"base model {folder} brings code of its own, which is never run, and cannot be loaded for {task} "
                "without it; take a model of a kind that transformers knows"
            ) from error
        raise ModelError(f"base model {folder} cannot be loaded for {task}: {error}") from error
    if task == "text-classification":
        # A decoder scores a text at its last token, which it finds by the id of the padding. Set now: some encoders
        # count positions by the id that they were built with.
        base.config.pad_token_id = reader.pad_token_id
    check_base(base, reader, task, folder, max_length)
    return Base(base, reader, find_head(base, report, task, folder), names)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, with a padding token.

    Raises:
        ModelError: There is none that can be used.
    """
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, use_fast=True, **_HERE)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        # Padding is masked and never learned, so any token will do; most language models name none.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {folder} needs a tokenizer.json and a padding or an end token; name one in "
            "tokenizer_config.json"
        )
    return tokenizer
