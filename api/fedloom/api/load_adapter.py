"""What a run left, put on its base model."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["load_adapter"]


def load_adapter(folder: str | Path, base: str | Path | None = None) -> "PeftModel | PreTrainedModel":
    """The base model with the adapter that a run left, of whatever kind, in evaluation mode on the CPU.

    The folder holds tensors, options and names, and no code: of a kind that is not installed here nothing is loaded.

    Args:
        folder: `adapter` or `merged` of a run folder, or what `fedloom export` wrote, but for format safetensors.
        base: The base model's folder or name; None takes the one that the run names. A merged model needs none.

    Raises:
        ConfigError: The folder is no such folder, or the kind of its adapter is not installed.
        ModelError: The base model is not the one that the adapter was trained on, or cannot be loaded.
    """
    from fedloom.client.models.base_folder import base_digest, resolve_base
    from fedloom.client.models.exports.loading import is_merged, load_exported

    folder = Path(folder)
    known = read_json(folder / "fedloom.json")
    if lacks := sorted({"base", "base_digest", "task", "labels"} - known.keys()):
        raise ConfigError(f"{folder / 'fedloom.json'} lacks {lacks[0]}; give a folder that a run or an export has left")
    plain = folder
    if not is_merged(folder):
        plain = resolve_base(str(known["base"] if base is None else base))
        if known["base_digest"] not in (None, found := base_digest(plain)):
            raise ModelError(
                f"the adapter in {folder} was trained on base model {known['base_digest']}, and {plain} is {found}; "
                "give the base model that it was trained on"
            )
    image_size, seconds = known.get("image_size"), known.get("audio_seconds")
    return load_exported(plain, folder, len(known["labels"]), known["task"], image_size, audio_seconds=seconds)
