"""The folder of a PEFT adapter, read and written without torch or the base model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedloom.core.config.parsing import read_json
from fedloom.core.errors import ConfigError
from fedloom.core.model_card import Form, model_card
from fedloom.core.peft_settings import lora_scale, more_than_pairs
from fedloom.core.runtime.export_folder import replace_export
from fedloom.core.schema import Array
from fedloom.strategies.merging.adapter import FinishedAdapter, Product

__all__ = ["PeftFolder", "read_folder", "write_folder"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PLAIN_START = (True, False, "gaussian", "eva")
"""`init_lora_weights` under which W0 is the base model's own; others, such as PiSSA, train beside another W0."""

_LOADING = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "THIS FOLDER")"""

_NOTES = """`base` is loaded as for the merged adapters. Their digests, the method and what is promised about their data
are in `fedloom.json`.
"""


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT adapter as it lies in a folder."""

    path: Path
    adapter: FinishedAdapter
    settings: Mapping[str, Any]
    """adapter_config.json."""
    facts: Mapping[str, Any]
    """fedloom.json; empty of an adapter that fedloom has not made."""
    digest: str
    """SHA-256 of its file of tensors, as start.digest pins it."""
    run: str = ""
    """The run folder that it is known to be a round of; adapters of one run say something about the same steps."""

    @property
    def scale(self) -> float:
        """The LoRA scale s of W = W0 + s B A."""
        return lora_scale(dict(self.settings))


def read_folder(path: Path) -> PeftFolder:
    """Read a PEFT LoRA adapter.

    Args:
        path: A folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigError: It is none, cannot be read, is more than plain pairs on linear layers, or holds NaN or Inf.
    """
    if not (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} holds no PEFT adapter: adapter_config.json is missing; give the folder of one, such as "
            "runs/NAME/adapter"
        )
    settings = read_json(path / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path} holds an adapter of kind {settings.get('peft_type')}; only LORA can be merged")
    start = settings.get("init_lora_weights", True)
    odd = more_than_pairs(settings) or (None if start in _PLAIN_START else f"init_lora_weights = {json.dumps(start)}")
    if odd:
        raise ConfigError(f"{path} has {odd}, so that it is more than W0 + s B A; only plain LoRA can be merged")
    try:
        content = (path / "adapter_model.safetensors").read_bytes()
        tensors, scale = load(content), lora_scale(settings)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"the adapter in {path} cannot be read: {error!r}; save it in float32") from error
    facts = read_json(path / "fedloom.json") if (path / "fedloom.json").is_file() else {}
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return PeftFolder(path, _adapter(path, tensors, scale), settings, facts, digest)


def write_folder(
    folder: Path, adapter: FinishedAdapter, like: PeftFolder, facts: Mapping[str, Any], count: int
) -> None:
    """Write an adapter as an ordinary PEFT adapter; what was there is replaced by all of it or not at all.

    Args:
        folder: Where to; it may hold an earlier export and nothing else.
        adapter: Its products have one rank r; they are saved at `like`'s scale s, so that lora_alpha is s r.
        like: An adapter of the same base model and layers, whose other settings are taken over.
        facts: What becomes fedloom.json.
        count: How many adapters it was made of.

    Raises:
        ConfigError: The folder holds other files or cannot be written, or a value is beyond float32.
    """
    exact = dict(adapter.whole)
    for module, product in adapter.products.items():
        exact |= {module + _A: product.a, module + _B: product.b / like.scale}
    most = np.finfo(np.float32).max
    if spoilt := [name for name, each in exact.items() if not (np.abs(each) <= most).all()]:
        raise ConfigError(f"{spoilt[0]} is beyond float32 after merging; lower the weights or the scaling")
    tensors = {name: np.ascontiguousarray(each, np.float32) for name, each in exact.items()}
    plain = {"r": adapter.rank, "lora_alpha": like.scale * adapter.rank, "use_rslora": False, "inference_mode": True}
    settings = {**like.settings, **plain}

    def write(draft: Path) -> None:
        (draft / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (draft / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        what = f"A PEFT adapter that `fedloom merge` made of {'one adapter' if count == 1 else f'{count} adapters'}."
        card = model_card(
            {"run": folder.resolve().name, **facts}, Form("peft", ("peft", "lora"), what, _LOADING, notes=_NOTES)
        )
        (draft / "README.md").write_text(card, encoding="utf-8")
        (draft / "fedloom.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    replace_export(folder, write)


def _adapter(path: Path, tensors: Mapping[str, Array], scale: float) -> FinishedAdapter:
    """The tensors as products and others."""
    products: dict[str, Product] = {}
    whole: dict[str, Array] = {}
    for name, value in sorted(tensors.items()):  # they come in no fixed order
        if not np.isfinite(value).all():
            raise ConfigError(f"the adapter in {path} has NaN or Inf in {name}; leave it out")
        module = name.removesuffix(_A).removesuffix(_B)
        if module == name:
            if ".lora_" in name:
                raise ConfigError(f"the adapter in {path} has {name}; only pairs on linear layers can be merged")
            whole[name] = value.astype(np.float64)
        elif name.endswith(_A):
            a, b = value, tensors.get(module + _B)
            if b is None or a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
                raise ConfigError(f"the adapter in {path} has no pair of matrices at {module}; save it again")
            products[module] = Product(scale * b.astype(np.float64), a.astype(np.float64))
        elif module + _A not in tensors:
            raise ConfigError(f"the adapter in {path} has no pair of matrices at {module}; save it again")
    return FinishedAdapter(products, whole)
