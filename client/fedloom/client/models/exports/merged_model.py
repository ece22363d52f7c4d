"""The result as a whole model: the adapter folded into the base model's weights."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.card import write_card
from fedloom.client.tasks.api import Traits
from fedloom.core.errors import ModelError
from fedloom.core.model_card import Form
from fedloom.core.runtime.export_folder import replace_export
from fedloom.core.tensor_file import TENSORS, tensor_file
from fedloom.strategies.result import result_schema

__all__ = ["merge", "save_merged"]


_WHAT = "A model with an adapter folded into its weights, trained with fedloom."

_LOADING = """from transformers import {names}

model = {kind}.from_pretrained("THIS FOLDER")"""

_READER = """
{name} = {kind}.from_pretrained("THIS FOLDER")"""

_TENSORS = """PEFT does not know this kind of adapter, so there is no PEFT folder of it. `adapter.safetensors` has what
was trained, by the names of the run's schema; another run with the same `[adapter]` goes on from this folder with
`[start]`.
"""


def save_merged(model: AdapterModel, folder: Path, facts: dict[str, Any], *, keep: bool = False) -> None:
    """Write the base model with the adapter folded into its weights, its tokenizer, a card, and `facts`.

    Of a kind that PEFT does not know the trained tensors are written too, as adapter.safetensors. The folder is written
    as by `save_adapter`.

    Args:
        model: Used up, unless it is to be kept: it then holds the merged weights.
        folder: Where to.
        facts: As of `save_adapter`.
        keep: Merge a copy, which takes the memory of the model again.

    Raises:
        ModelError: As by `merge`.
        ConfigError: As by `save_adapter`.
    """
    trained = {} if model.adapter.traits.peft else {**model.read(model.schema), **model.corrections}
    merged = merge(model, keep=keep)

    def write(draft: Path) -> None:
        merged.save_pretrained(str(draft), safe_serialization=True)
        model.tokenizer.save_pretrained(str(draft))
        if trained:
            (draft / TENSORS).write_bytes(tensor_file(trained, result_schema(model.schema, trained), facts))
        form = Form("transformers", (), _WHAT, _loading(model.task.traits), notes=_TENSORS if trained else "")
        write_card(draft, form, model.task, facts)

    replace_export(folder, write)


def _loading(traits: Traits) -> str:
    """Code that loads the model, and what reads texts or recordings for it."""
    if traits.images:
        return _LOADING.format(names=traits.model, kind=traits.model)
    sounds = traits.audio and not traits.generates
    name, reader = ("extractor", "AutoFeatureExtractor") if sounds else ("tokenizer", "AutoTokenizer")
    names = ", ".join(sorted((reader, traits.model)))
    return _LOADING.format(names=names, kind=traits.model) + _READER.format(name=name, kind=reader)


def merge(model: AdapterModel, *, keep: bool = False) -> PreTrainedModel:
    """The base model with the adapter folded into its weights, a plain model of transformers.

    W0 + scale·B·A takes the place of W0, in float32, and a kind that PEFT does not know folds its tensors in itself.

    Args:
        model: Used up, unless it is to be kept.
        keep: Merge a copy, which takes the memory of the model again.

    Raises:
        ModelError: A weight is quantised or shared with the embeddings, would not be finite, or the kind of adapter
            cannot be merged.
    """
    base, peft = model.model.get_base_model(), model.adapter.traits.peft
    remedy = f"export with format {'peft' if peft else 'safetensors'}"
    quantised = [name for name, each in base.named_parameters() if not each.is_floating_point()]
    if quantised:
        raise ModelError(f"{quantised[0]} is quantised, and a merged weight would be rounded; {remedy}")
    try:
        shared = getattr(base.get_input_embeddings(), "weight", None)  # a vision model embeds patches otherwise
    except NotImplementedError:  # and a model of waves nothing
        shared = None
    for pair in model.schema.pairs:
        if base.get_submodule(pair.module).base_layer.weight is shared:
            raise ModelError(
                f"{pair.module} shares its weight with the embeddings, which merging would change too; {remedy}"
            )
    whole = copy.deepcopy(model.model) if keep else model.model
    try:
        if not peft:
            model.adapter.merge(whole)
        merged: PreTrainedModel = whole.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {error}; the run has diverged, lower its rates") from error
    if model.task.traits.generates:
        merged.config.use_cache = True  # training had no use for it, generating has
    return merged
