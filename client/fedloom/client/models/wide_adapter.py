"""A PEFT adapter that holds a correction of the frozen weights too: exactly, at a higher rank."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedloom.core.schema import Schema, Tensors

__all__ = ["widen"]


def widen(folder: Path, schema: Schema, corrections: Tensors) -> None:
    """Put corrections of rank k into the files of a PEFT adapter of rank r, which then has rank r + k.

    s (B A + base_B base_A) is s [B base_B] [A; base_A], and PEFT takes s to be alpha over the rank: alpha = s (r + k).

    Args:
        folder: What PEFT has saved.
        schema: Its schema.
        corrections: MODULE.base_A, shape (k, in), and MODULE.base_B, shape (out, k), of every pair.
    """
    path = folder / "adapter_model.safetensors"
    tensors, rank = load_file(path), 0
    for pair in schema.pairs:
        tensors[pair.a] = np.concatenate([tensors[pair.a], corrections[f"{pair.module}.base_A"]])
        tensors[pair.b] = np.concatenate([tensors[pair.b], corrections[f"{pair.module}.base_B"]], axis=1)
        rank = len(tensors[pair.a])
    save_file(tensors, path, {"format": "pt"})
    about = folder / "adapter_config.json"
    settings = json.loads(about.read_text(encoding="utf-8"))
    settings |= {"r": rank, "lora_alpha": schema.scale * rank, "use_rslora": False}
    about.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
