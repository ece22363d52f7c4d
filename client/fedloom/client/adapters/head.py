"""The task head: what scores a text or a picture on top of the encoder, whether or not the checkpoint has it.

The loading report of transformers says which weights a checkpoint lacks. Whatever it lacks would be random in every
process, so it belongs to the head too: it starts from the run's seed, travels and is saved with the adapter. A head
that the checkpoint brings travels as its change, as biases do.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedloom.client.adapters.slot import Slot, schema_name
from fedloom.client.tasks.api import Task
from fedloom.core.errors import ModelError
from fedloom.core.peft_settings import PREFIX
from fedloom.core.schema import Role, Start, TensorSpec

__all__ = ["PEFT_HEADS", "Head", "check_labels", "find_head", "slots"]

PEFT_HEADS = ("classifier", "score")
"""Modules that PEFT saves of itself with an adapter for sequences or tokens."""

_OUTER = (*PEFT_HEADS, "projector")
"""Modules that belong to a head where a model's class does not say which of its parts is the encoder, as Whisper's."""

_COMPUTED = ("inv_freq", "position_ids", "masked_bias", "attn.bias")
"""Ends of names that old checkpoints hold and that models now compute."""
_NO_NAME = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Head:
    """The head of one loaded base model."""

    modules: tuple[str, ...] = ()
    """Full names of its modules, none inside another."""
    new: frozenset[str] = frozenset()
    """Names of its parameters whose values the checkpoint does not give."""
    resized: bool = False
    """The checkpoint has some of these, for another number of labels."""


def find_head(base: PreTrainedModel, report: dict[str, Any], task: Task, folder: Path) -> Head:
    """The head of a model from how its checkpoint was loaded.

    Args:
        base: The model.
        report: `from_pretrained`'s loading info, with mismatched sizes ignored.
        task: What the model is to do.
        folder: Where it lies, for errors.

    Raises:
        ModelError: The checkpoint lacks weights of the encoder itself, or holds some that the model does not use.
    """
    parameters = dict(base.named_parameters())
    resized = {name for name, *_ in report["mismatched_keys"]}
    new = frozenset((set(report["missing_keys"]) | resized) & parameters.keys())
    _check_whole(base, new, report, task, folder)
    if task.traits.generates or task.traits.headless:
        return Head()
    inside = f"{base.base_model_prefix}."
    within = base.base_model is not base
    beyond = {
        name
        for name in parameters
        if "." in name and (name.partition(".")[0] in _OUTER or (within and not name.startswith(inside)))
    }
    owners = {_module(name) for name in new | beyond}
    outer = {each for each in owners if not any(each.startswith(f"{other}.") for other in owners)}
    return Head(tuple(sorted(outer)), new, bool(resized))


def _check_whole(base: PreTrainedModel, new: frozenset[str], report: dict[str, Any], task: Task, folder: Path) -> None:
    """Refuse a checkpoint that is not the model that config.json describes, apart from its head."""
    modules, kind = dict(base.named_modules()), type(base).__name__
    body = sorted(
        name
        for name in new
        if task.traits.generates
        or "." not in name
        or any(part.isdigit() for part in name.split("."))
        or isinstance(modules[name.rpartition(".")[0]], nn.Embedding)
    )
    if body:
        raise ModelError(
            f"base model {folder} lacks {len(body)} weights of {kind} or has them in another shape, such as "
            f"{body[0]}; they would be random, so get the whole checkpoint, or one whose config.json fits its weights"
        )
    inside = f"{base.base_model_prefix}."
    unused = sorted(
        name
        for name in report["unexpected_keys"]
        if not name.endswith(_COMPUTED) and {_list_of(name), inside + _list_of(name)} & modules.keys()
    )
    if unused:
        raise ModelError(
            f"base model {folder} holds {len(unused)} weights that {kind} has no place for, such as {unused[0]}; get "
            "a checkpoint whose config.json fits its weights, with adapters of its own merged"
        )
    if report["error_msgs"]:
        raise ModelError(f"base model {folder} cannot be loaded for {type(task).__name__}: {report['error_msgs'][0]}")


def _list_of(name: str) -> str:
    """The list of layers that a weight is in, or what is no module's name.

    >>> _list_of("bert.encoder.layer.5.output.dense.weight")
    'bert.encoder.layer'
    >>> _list_of("pooler.dense.weight")
    '?'
    """
    found = re.match(r"(.*?)\.\d+\.", name)
    return found.group(1) if found else "?"


def _module(parameter: str) -> str:
    """The module by which a parameter of the head is saved: its own, or all of one that PEFT saves in any case."""
    first = parameter.partition(".")[0]
    return first if first in PEFT_HEADS else parameter.rpartition(".")[0]


def check_labels(head: Head, names: dict[int, str], labels: tuple[str, ...], folder: Path) -> None:
    """Refuse a head that was trained for other labels.

    Args:
        head: The model's head.
        names: The checkpoint's own label names by index; LABEL_0 and the like name nothing.
        labels: The run's.
        folder: Where the model lies, for errors.

    Raises:
        ModelError: The checkpoint's head has as many labels, of other names or in another order.
    """
    if not head.modules or head.new or not labels or all(_NO_NAME.fullmatch(name) for name in names.values()):
        return
    theirs = [names[index] for index in sorted(names)]
    if [each.casefold() for each in theirs] == [each.casefold() for each in labels]:
        return
    first = f"base model {folder} has a head that was trained for the labels {theirs} in this order"
    if sorted(each.casefold() for each in theirs) == sorted(each.casefold() for each in labels):
        raise ModelError(f"{first}, and the run has {list(labels)}; set model.labels = {theirs}")
    raise ModelError(
        f"{first}, and the run has {list(labels)}; if they mean the same, set model.labels to the head's; to train a "
        "new head, take the encoder alone: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    )


def slots(model: PeftModel, head: Head) -> list[Slot]:
    """The parameters of the head's modules, which PEFT saves whole (modules_to_save), in model order."""
    found: list[Slot] = []
    for name, parameter in model.named_parameters():
        key = schema_name(name)
        plain = key.removeprefix(PREFIX)
        if ".modules_to_save.default." in name and any(plain.startswith(f"{each}.") for each in head.modules):
            # A new vector starts as the model's own code makes it: one for the weight of a norm, zero for a bias.
            drawn = plain in head.new and (parameter.dim() > 1 or not parameter.any())
            origin = None if drawn else parameter.detach().clone()
            start = Start.DRAWN if plain in head.new else Start.ZERO
            spec = TensorSpec(key, plain.rpartition(".")[0], Role.HEAD, tuple(parameter.shape), start)
            found.append(Slot(spec, parameter, origin))
    return found
