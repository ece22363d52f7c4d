"""A PEFT adapter that holds a correction of the frozen weights too: exactly, at a higher rank."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedloom.core.peft_settings import PREFIX, lora_scale
from fedloom.core.schema import Tensors

__all__ = ["widen"]


def widen(folder: Path, corrections: Tensors) -> None:
    """Put corrections of rank k into the files of a PEFT adapter of rank r, which then has rank r + k.

    s (B A + base_B base_A) is s [B base_B] [A; base_A], and PEFT takes s to be alpha over the rank: alpha = s (r + k).

    Args:
        folder: What PEFT has saved.
        corrections: MODULE.base_A, shape (k, in), and MODULE.base_B, shape (out, k), of every pair.
    """
    path = folder / "adapter_model.safetensors"
    tensors, rank = load_file(path), 0
    for module in (name.removesuffix(".base_A") for name in corrections if name.endswith(".base_A")):
        a, b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        tensors[a] = np.concatenate([tensors[a], corrections[f"{module}.base_A"]])
        tensors[b] = np.concatenate([tensors[b], corrections[f"{module}.base_B"]], axis=1)
        rank = len(tensors[a])
    save_file(tensors, path, {"format": "pt"})
    about = folder / "adapter_config.json"
    settings = json.loads(about.read_text(encoding="utf-8"))
    settings |= {"r": rank, "lora_alpha": lora_scale(settings) * rank, "use_rslora": False}
    about.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
