"""The result as an ordinary Hugging Face PEFT adapter, or as a whole model."""

import copy
import errno
import json
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedloom.client.adapters.spectral.lora_start import taken_out
from fedloom.client.data.tokens import Encoded, collate, microbatches
from fedloom.client.models.adapter_folder import is_folder, load_folder, write_folder
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import ON_CPU, load_base, load_model
from fedloom.client.models.quantization import loading, saved_in_float32
from fedloom.client.models.wide_adapter import widen
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import Task, task_named
from fedloom.client.training.device import on_device, prepare_device
from fedloom.client.training.losses import labelled
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.privacy.accounting import Statement
from fedloom.core.privacy.spends import run_statement
from fedloom.core.runtime.export_folder import replace_export
from fedloom.core.schema import Tensors
from fedloom.core.tensor_file import TENSORS, tensor_file
from fedloom.strategies.result import result_schema

__all__ = [
    "facts",
    "is_merged",
    "load_exported",
    "predict",
    "privacy_facts",
    "result_name",
    "save_adapter",
    "save_final",
    "save_folder",
    "save_merged",
    "save_result",
    "writable",
]

_SHORT = 8
"""Tokens that any model can read: what it was trained to read was checked before."""

_CARD = """# {name}

A PEFT adapter trained with fedloom.

```python
from transformers import {kind}
from peft import PeftModel

base = {kind}.from_pretrained("BASE"{arguments})
model = PeftModel.from_pretrained(base, "THIS FOLDER")
```

`fedloom.json` has the base model's digest, the label names and, for a private run, the guarantee.
"""


_MERGED_CARD = """# {name}

A model with an adapter folded into its weights, trained with fedloom.

```python
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

`fedloom.json` has the base model's digest, the label names and, for a private run, the guarantee.
{more}"""

_TENSORS_CARD = """
PEFT does not know this kind of adapter, so there is no PEFT folder of it. `adapter.safetensors` has what was trained,
by the names of the run's schema; another run with the same `[adapter]` goes on from this folder with `[start]`.
"""


def result_name(model: AdapterModel) -> str:
    """What the folder of a run's result is called: "merged" if it is a merged model, and else "adapter"."""
    return "merged" if model.adapter.traits.result == "merged" else "adapter"


def save_result(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write what a run gives: a PEFT adapter, or a merged model where PEFT does not know the kind.

    Of a kind that cannot be merged either it is a folder of tensors and options. The model stays as it is.

    Raises:
        ModelError: As by `save_merged`.
        ConfigError: As by `save_adapter` or `save_folder`.
    """
    match model.adapter.traits.result:
        case "peft":
            save_adapter(model, folder, facts)
        case "merged":
            save_merged(model, folder, facts, keep=True)
        case "fedloom":
            save_folder(model, folder, facts)


def save_folder(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """Write the adapter that the model holds now as tensors and options, see `fedloom.client.models.adapter_folder`.

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
    replace_export(folder, lambda draft: write_folder(model, draft, facts))


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


def save_merged(model: AdapterModel, folder: Path, facts: dict[str, Any], *, keep: bool = False) -> None:
    """Write the base model with the adapter folded into its weights, its tokenizer, a card, and `facts`.

    W0 + scale·B·A takes the place of W0, in float32, and a kind that PEFT does not know folds its tensors in itself.
    Of such a kind the trained tensors are written too, as adapter.safetensors. The folder is written as by
    `save_adapter`.

    Args:
        model: Used up, unless it is to be kept: it then holds the merged weights.
        folder: Where to.
        facts: As of `save_adapter`.
        keep: Merge a copy, which takes the memory of the model again.

    Raises:
        ModelError: A weight is quantised or shared with the embeddings, or would not be finite.
        ConfigError: As by `save_adapter`.
    """
    base, peft = model.model.get_base_model(), model.adapter.traits.peft
    remedy = f"export with format {'peft' if peft else 'safetensors'}"
    quantised = [name for name, each in base.named_parameters() if not each.is_floating_point()]
    if quantised:
        raise ModelError(f"{quantised[0]} is quantised, and a merged weight would be rounded; {remedy}")
    shared = base.get_input_embeddings().weight
    for pair in model.schema.pairs:
        if base.get_submodule(pair.module).base_layer.weight is shared:
            raise ModelError(
                f"{pair.module} shares its weight with the embeddings, which merging would change too; {remedy}"
            )
    trained = {} if peft else {**model.read(model.schema), **model.corrections}
    whole = copy.deepcopy(model.model) if keep else model.model
    try:
        if not peft:
            model.adapter.merge(whole)
        merged = whole.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {error}; the run has diverged, lower its rates") from error
    if model.task.traits.generates:
        merged.config.use_cache = True  # training had no use for it, generating has

    def write(draft: Path) -> None:
        merged.save_pretrained(str(draft), safe_serialization=True)
        model.tokenizer.save_pretrained(str(draft))
        kind, more = model.task.traits.model, "" if peft else _TENSORS_CARD
        (draft / "README.md").write_text(_MERGED_CARD.format(name=facts.get("run", "model"), kind=kind, more=more))
        if not peft:
            (draft / TENSORS).write_bytes(tensor_file(trained, result_schema(model.schema, trained), facts))
        (draft / "fedloom.json").write_text(json.dumps(facts, indent=2) + "\n")

    replace_export(folder, write)


def _write(model: AdapterModel, folder: Path, facts: dict[str, Any]) -> None:
    """All of an adapter's files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft cannot find a model card for a base model in a local folder
        model.model.save_pretrained(str(folder), safe_serialization=True)
    if corrections := model.corrections or taken_out(model.slots.values()):
        widen(folder, corrections)
    _settle(folder / "adapter_config.json", facts.get("base"))
    labels = facts.get("labels", ())
    kind = model.task.traits.model
    arguments = f", num_labels={len(labels)}" if labels else ""
    if model.head.resized:
        arguments += ", ignore_mismatched_sizes=True"  # the base model's own head is for other labels
    (folder / "README.md").write_text(_CARD.format(name=facts.get("run", "adapter"), kind=kind, arguments=arguments))
    (folder / "fedloom.json").write_text(json.dumps(facts, indent=2) + "\n")


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


def save_final(model: AdapterModel, spec: Spec, tensors: Tensors, folder: Path, rounds: int) -> None:
    """Write the result that a run ended with, as a client has it; what was at `folder` before is replaced whole.

    Clients that share the folder may all do so at once: it holds one of their adapters, which are the same unless they
    keep tensors to themselves. Its guarantee is that of a client that took part in every round: a client knows of no
    other's rounds. Where somebody did, and no user-level noise is added, which a client is not told of, the files are
    those of an export by the coordinator, byte for byte.

    Args:
        model: The base model that this client trained with.
        spec: The run.
        tensors: The run's result, with what this client keeps to itself.
        folder: Where to.
        rounds: How many rounds made it.

    Raises:
        ConfigError: The folder cannot be written.
    """
    privacy = run_statement(spec, rounds) if spec.privacy.enabled else None
    model = writable(model, spec)
    model.show(tensors)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            save_result(model, made, facts(spec, privacy))
            while True:
                try:
                    made.rename(folder)
                    return
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                with suppress(FileNotFoundError):  # another client has moved it away
                    folder.rename(Path(tempfile.mkdtemp(dir=scratch)) / folder.name)
    except OSError as error:
        raise ConfigError(f"the adapter cannot be written to {folder}: {error}; let this user write there") from error


def writable(model: AdapterModel, spec: Spec) -> AdapterModel:
    """The model to write results of a run with: this one, or one that gives the same bytes wherever it is loaded.

    A result that holds weights of the base model is made in float32 on the CPU: in fewer bits they would be rounded by
    what is folded into them, and each device adds up in an order of its own.
    """
    weights = list(model.model.parameters())
    here = all(each.dtype == torch.float32 and each.device.type == "cpu" for each in weights)
    if here or model.adapter.traits.result != "merged":
        return model
    own = spec.model.model_copy(update={"base": model.model.get_base_model().name_or_path})
    return load_model(own, spec.adapter)


def facts(spec: Spec, privacy: Statement | None, user: dict[str, Any] | None = None) -> dict[str, Any]:
    """What an adapter's user should know: base model, labels, and the privacy guarantee with its terms.

    Args:
        spec: A completed run file, or what a client has seen of it. Nothing is told that clients are not, such as the
            strategy, but for what a run file says it began from: without [start] the same adapter has the same facts
            wherever it is written.
        privacy: Statement of the client that has spent most; None in a run without privacy.
        user: The coordinator's statement on whole clients; None without user-level privacy.
    """
    known: dict[str, Any] = {
        "run": spec.run.name,
        "base": spec.model.base,
        "base_digest": spec.model.digest,
        "task": spec.model.task,
        "labels": list(spec.model.labels),
        "rounds": spec.run.rounds,
        "privacy": None,
        "user_privacy": user,
    }
    if spec.model.image_size is not None:
        known["image_size"] = spec.model.image_size
    if isinstance(spec, RunConfig) and spec.start is not None:
        known["start"] = {"adapter": Path(spec.start.adapter).name, "digest": spec.start.digest}
    if privacy is not None:
        known["privacy"] = privacy_facts(spec, privacy.document())
    return known


def privacy_facts(spec: Spec, stated: dict[str, Any]) -> dict[str, Any]:
    """A statement's document with the mechanism in words."""
    return {
        **stated,
        "mechanism": "DP-SGD on every client: Poisson sampling, per-example clipping, Gaussian noise",
        "clip_norm": spec.privacy.clip_norm,
        "clipping": spec.privacy.clipping,
    }


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
) -> PreTrainedModel | PeftModel:
    """What a user gets who follows the card: the plain base model with the saved adapter, or the merged model.

    Args:
        base: The base model's folder.
        adapter: The adapter's, or the merged model's.
        labels: How many there are.
        task: Name of the task.
        image_size: Side of pictures in pixels; None is the base model's own.
        compute: Where, and in what precision of the frozen weights.

    Raises:
        ModelError: The base model, or the merged one, cannot be loaded, or the adapter is not one for it.
        ConfigError: The adapter is of a kind that is not installed here.
    """
    names = tuple(f"LABEL_{index}" for index in range(labels))
    kind = task_named(task, names, _SHORT, image_size)
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
