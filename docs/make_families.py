"""Write the table of docs/families.md from tests/families.json; `--check` exits 1 when it is not what it has."""

import json
from pathlib import Path
from typing import Any

from docs.made import between_marks, write

TARGET = Path(__file__).with_name("families.md")
SOURCE = TARGET.parent.parent / "tests" / "families.json"

NAMES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "deberta": "DeBERTa-v3 (`deberta-v2`)",
    "modernbert": "ModernBERT",
    "albert": "ALBERT",
    "electra": "ELECTRA",
    "xlnet": "XLNet",
    "gpt2": "GPT-2",
    "gpt-neox": "GPT-NeoX, Pythia",
    "opt": "OPT",
    "llama": "Llama, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "phi": "Phi",
    "smollm3": "SmolLM3",
    "mixtral": "Mixtral (experts)",
    "qwen2-moe": "Qwen2-MoE (experts)",
    "t5": "T5",
    "bart": "BART",
    "whisper": "Whisper (to classify, its encoder)",
    "ast": "AST",
    "wav2vec2": "Wav2Vec2",
    "hubert": "HuBERT",
    "vit": "ViT",
    "deit": "DeiT",
    "swin": "Swin",
    "dinov2": "DINOv2",
    "clip": "CLIP (its image tower)",
    "siglip": "SigLIP (its image tower)",
}
"""What a family is called, in the order of the table."""

_HEAD = (
    '| family | tasks | `"auto"` finds | values trained | `"all-linear"` finds | values trained '
    "| largest difference | refused |"
)


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    write("make_families", {TARGET: page()})


def page() -> str:
    """The page with its table."""
    rows = json.loads(SOURCE.read_text(encoding="utf-8"))
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|"]
    lines += [_line(name, [row for row in rows if row["family"] == family]) for family, name in NAMES.items()]
    return between_marks(TARGET, "make_families", "\n" + "\n".join(lines) + "\n")


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    trained = [row for row in rows if "refused" not in row]
    reasons = dict.fromkeys(f"{row['task']}: {row['refused']}" for row in rows if "refused" in row)
    tasks = dict.fromkeys(row["task"] for row in trained)
    told = ", ".join(f"`{task}`" for task in tasks)
    cells = [name, told or "none privately"]
    for targets in ("auto", "all-linear"):
        first = next((row for row in trained if row["targets"] == targets), None)
        cells += ["none", "0"] if first is None else [_layers(first), f"{first['values']:,}"]
    cells.append(_figure(max(max(row["gradient"], row["step"]) for row in trained)) if trained else "not measured")
    return f"| {' | '.join([*cells, '; '.join(reasons) or 'nothing'])} |"


def _layers(row: dict[str, Any]) -> str:
    return ", ".join(f"`{layer}`" for layer in row["layers"])


def _figure(value: float) -> str:
    """One digit and a power of ten.

    >>> _figure(6.3e-06)
    '6·10⁻⁶'
    """
    digit, _, power = f"{value:.0e}".partition("e-")
    return f"{digit}·10⁻{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


if __name__ == "__main__":
    main()
