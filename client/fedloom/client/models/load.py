"""The resident model: the base is loaded once and stays on the device; a round swaps the adapter only."""

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
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
from transformers.utils import cached_file

from fedloom.client.adapters import Head, Slot, attach, check_labels, find_head
from fedloom.client.assets.fetch import ASSETS, fetch
from fedloom.client.data.images import picture_settings
from fedloom.client.models.base_checks import check_base
from fedloom.client.models.loading_context import quiet, repeatable
from fedloom.client.models.quantization import keep_float32, loading, recompute_layers
from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.training.device import prepare_device
from fedloom.core.config.run import AdapterSection, ModelSection, Spec, Task
from fedloom.core.errors import ModelError, PolicyError
from fedloom.core.schema import Array, Role, Schema, Tensors

__all__ = [
    "MODELS",
    "ON_CPU",
    "AdapterModel",
    "Base",
    "allowed_base",
    "base_digest",
    "load_base",
    "load_model",
    "load_tokenizer",
    "resolve_base",
]

MODELS: dict[Task, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "instruct": AutoModelForCausalLM,
    "image-classification": AutoModelForImageClassification,
}
"""The class that loads a base model for each task."""

ON_CPU = ComputePolicy(device="cpu")
"""Where simulations and exports work, whatever device there is: their results are compared."""

_FLOAT32: Mapping[str, Any] = {"dtype": torch.float32}
_HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded, and no code that lies with a model is run: left open, transformers asks at the terminal."""
_REPORTED: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What a checkpoint lacks, or has in another shape, is looked at by `find_head`."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def resolve_base(base: str) -> Path:
    """The folder of a base model named in a run or policy file.

    Args:
        base: A local folder, an asset's name, or ORG/NAME of a model that is in this machine's hub cache.

    Raises:
        ModelError: There is no such folder, or it holds no safetensors weights.
    """
    folder = fetch(base) if base in ASSETS else Path(base).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(base):
        folder = _cached(base)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.base {base!r}: {folder} has no config.json; give a folder saved by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model.base {base!r}: {folder} has no *.safetensors; other weight formats are not read")
    return folder


def _cached(hub_id: str) -> Path:
    """The folder of the revision that the hub cache has as the main one; nothing is downloaded."""
    try:
        return Path(str(cached_file(hub_id, "config.json", local_files_only=True))).parent
    except OSError as error:
        raise ModelError(
            f"model.base {hub_id!r} is neither a local folder nor in this machine's hub cache, and nothing is "
            f"downloaded in a run; run `hf download {hub_id}` first, or give a folder"
        ) from error


def base_digest(folder: Path) -> str:
    """Identity of a base model: SHA-256 over its configuration, weights and tokenizer files.

    Returns:
        "sha256:" and 64 hex digits.
    """
    total = hashlib.sha256()
    for path in sorted({path for pattern in _DIGESTED for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256")
        total.update(f"{path.name}\0{part.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def allowed_base(policy: Policy, spec: Spec) -> Path:
    """The folder of the run's base model as this site has it.

    Raises:
        ModelError: There is none, or its digest is not the one that the run pins.
        PolicyError: It is not one this site allows.
    """
    base = policy.model.folder or spec.model.base
    folder = resolve_base(base)
    found = base_digest(folder)
    if policy.model.digests and found not in policy.model.digests:
        raise PolicyError(
            f"base model {base!r} has digest {found}; this site allows {', '.join(policy.model.digests)} "
            "(model.digests in the policy)"
        )
    if spec.model.digest is not None and found != spec.model.digest:
        raise ModelError(
            f"base model {base!r} has digest {found}; the run pins {spec.model.digest}; get the same files"
        )
    return folder


_NO_HEAD = Head()


class Base(NamedTuple):
    """A base model as it was loaded."""

    model: PreTrainedModel
    reader: Any
    """Its tokenizer, or its `ImageProcessor`."""
    head: Head
    names: dict[int, str]
    """The label names of its checkpoint; LABEL_0 and so on where it has none."""


class AdapterModel:
    """A frozen base model with a swappable adapter.

    Dropout is off in training too: an example's gradient is then a function of the example and the
    parameters alone, whatever else is in its batch.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        slots: list[Slot],
        scale: float,
        device: torch.device,
        head: Head = _NO_HEAD,
    ) -> None:
        """Use `load_model`; the parts must belong together."""
        self.head = head
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        """What turns rows into the model's numbers; of a model of pictures their `ImageProcessor`."""
        self.device = device
        self.slots = {slot.spec.name: slot for slot in slots}
        self.schema = Schema(tuple(slot.spec for slot in slots), scale)
        self._base_weights: dict[str, torch.Tensor] = {}
        self.corrections: dict[str, Array] = {}
        """What the frozen weights carry beside their pretrained values, by the names of a broadcast."""
        self.rank = self.schema.rank
        self.probed = False
        """Whether the sensitivity probe has passed on this model, see `privacy.probe`."""
        self.example_bytes: int | None = None
        """Memory that one example takes in training; None until it is measured, see `fitting`."""
        self._initial = self.read(self.schema)

    def load(self, tensors: Tensors, rank: int | None = None) -> None:
        """Put adapter values in place; low-rank factors below the schema's rank are padded with zeros.

        Args:
            tensors: Values by schema name; names left out keep their value.
            rank: Rank the client works at from now on; None is the schema's.
        """
        self.rank = rank or self.schema.rank
        with torch.no_grad():
            for name, value in tensors.items():
                if name in self.slots:
                    slot = self.slots[name]
                    target = torch.zeros_like(slot.parameter)
                    target[tuple(slice(0, size) for size in value.shape)] = torch.from_numpy(np.array(value)).to(target)
                    slot.parameter.copy_(target if slot.origin is None else slot.origin.to(target) + target)
            for pair in self.schema.pairs:
                if f"{pair.module}.base_A" in tensors:
                    self._correct(pair.module, tensors)

    def show(self, result: Tensors) -> None:
        """Be the model of a run's result: frozen weights that it does not correct have their pretrained values."""
        with torch.no_grad():
            for module, pretrained in self._base_weights.items():
                self.model.get_submodule(f"base_model.model.{module}").base_layer.weight.copy_(pretrained)
        self.corrections = {}
        self.load(result)

    def reset(self, roles: Iterable[Role], rank: int | None = None) -> None:
        """Put the tensors of `roles` back to the values they had when the model was loaded, cut to `rank`."""
        schema = self.schema if rank is None else self.schema.with_rank(rank)
        cut = {s.name: tuple(slice(0, size) for size in s.shape) for s in schema.select(roles).tensors}
        self.load({name: self._initial[name][part] for name, part in cut.items()}, rank)

    def _correct(self, module: str, tensors: Tensors) -> None:
        """Set a frozen weight to its pretrained value plus scale·base_B·base_A."""
        layer: Any = self.model.get_submodule(f"base_model.model.{module}")
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            raise ModelError(
                "this run's strategy corrects the frozen base model, which cannot be done to 4-bit weights; set "
                'compute.quantization = "none", with compute.dtype = "bfloat16" to save memory'
            )
        pretrained = self._base_weights.setdefault(module, weight.detach().clone())
        self.corrections |= {name: np.array(tensors[name]) for name in (f"{module}.base_B", f"{module}.base_A")}
        left, right = (torch.from_numpy(self.corrections[f"{module}.base_{side}"]) for side in "BA")
        correction = self.schema.scale * (left.to(weight) @ right.to(weight))
        weight.copy_(pretrained + (correction.t() if layer.fan_in_fan_out else correction))

    def read(self, schema: Schema) -> dict[str, Array]:
        """The current values of the tensors of `schema`, at its shapes, float32."""
        values: dict[str, Array] = {}
        for spec in schema.tensors:
            slot = self.slots[spec.name]
            value = slot.parameter.detach()
            value = value if slot.origin is None else value - slot.origin.to(value)
            cut = value[tuple(slice(0, size) for size in spec.shape)]
            values[spec.name] = cut.to("cpu", torch.float32, copy=True).numpy()
        return values

    def trainable(self, roles: Iterable[Role]) -> list[nn.Parameter]:
        """Make exactly the tensors of `roles` require gradients, and return their parameters in wire order."""
        wanted = frozenset(roles)
        chosen: list[nn.Parameter] = []
        for slot in self.slots.values():
            slot.parameter.requires_grad_(slot.spec.role in wanted)
            slot.parameter.grad = None
            if slot.spec.role in wanted:
                chosen.append(slot.parameter)
        return chosen

    def parameters_of(self, roles: Iterable[Role]) -> frozenset[nn.Parameter]:
        """The parameters that hold the tensors of `roles`."""
        wanted = frozenset(roles)
        return frozenset(slot.parameter for slot in self.slots.values() if slot.spec.role in wanted)

    def rank_masks(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
        """1 within the current rank and 0 beyond, for the low-rank factors among `parameters`; empty at full rank."""
        if self.rank >= self.schema.rank:
            return {}
        cut = {spec.name: spec.shape for spec in self.schema.with_rank(self.rank).tensors}
        masks: dict[nn.Parameter, torch.Tensor] = {}
        chosen = set(parameters)
        for name, slot in self.slots.items():
            if slot.parameter in chosen and cut[name] != slot.spec.shape:
                mask = torch.zeros_like(slot.parameter)
                mask[tuple(slice(0, size) for size in cut[name])] = 1.0
                masks[slot.parameter] = mask
        return masks

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class scores, float32, shape (batch, labels), or (batch, length, labels or vocabulary) at each token."""
        inputs = {name: value.to(self.device) for name, value in batch.items() if name != "labels"}
        scores: torch.Tensor = self.model(**inputs).logits
        return scores.float()


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
    options = loading(compute, adapter, device)
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
        peft_model, slots = attach(base, adapter, model.task, head)
    if model.head == "train" and not any(slot.spec.role is Role.HEAD for slot in slots):
        raise ModelError(f"{type(base).__name__} in {folder} has no head that could be trained; take another model")
    keep_float32(peft_model, slots)
    if compute.gradient_checkpointing:
        recompute_layers(peft_model)
    return AdapterModel(peft_model, tokenizer, slots, adapter.alpha / adapter.rank, device, head)


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
