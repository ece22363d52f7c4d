"""What a run leaves without being asked: its result in the form that the kind of adapter has."""

import errno
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.adapter_folder import save_folder
from fedloom.client.models.exports.facts import facts
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.spends import run_statement
from fedloom.core.schema import Tensors

__all__ = ["result_name", "save_final", "save_result", "writable"]


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
