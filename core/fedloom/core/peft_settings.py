"""What PEFT calls the layers of a base model, and what adapter_config.json says of products s·B·A."""

import json
import math
from typing import Any

__all__ = ["PREFIX", "lora_scale", "more_than_pairs"]

PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""

_PLAIN = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens")
"""Settings of PEFT's LoRA under which an adapter is no plain pair of factors of one rank."""


def lora_scale(settings: dict[str, Any]) -> float:
    """The LoRA scale s: alpha over the rank, or over its square root with rank-stabilised LoRA (arXiv 2312.03732).

    >>> lora_scale({"r": 4, "lora_alpha": 8}), lora_scale({"r": 4, "lora_alpha": 8, "use_rslora": True})
    (2.0, 4.0)
    """
    rank, alpha = int(settings.get("r", 8)), float(settings.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def more_than_pairs(settings: dict[str, Any]) -> str | None:
    """What makes an adapter something else than plain LoRA pairs, as a sentence goes on after "has"; None if nothing.

    >>> more_than_pairs({"peft_type": "LORA", "use_dora": True})
    'use_dora = true'
    """
    odd = next((key for key in _PLAIN if settings.get(key)), None)
    return None if odd is None else f"{odd} = {json.dumps(settings[odd])}"
