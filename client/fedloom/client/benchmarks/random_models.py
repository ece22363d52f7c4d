"""Models of real sizes with random weights: a benchmark needs their shapes, and no network to get them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, RobertaConfig

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.attach import adapter_of, attach, scale_of
from fedloom.client.adapters.head import Head, find_head
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.loading_context import repeatable
from fedloom.client.models.quantization import dtype_of, is_quantised, keep_float32, recompute_layers
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import task_named
from fedloom.client.training.device import prepare_device
from fedloom.core.config.run import AdapterSection

__all__ = ["SIZES", "decoder", "encoder", "random_model"]

_PAD = 1
_HEAD_WIDTH = 64
_ALL_LINEAR = AdapterSection(rank=8, targets="all-linear")


def encoder(layers: int, width: int, vocabulary: int) -> PreTrainedConfig:
    """An encoder like RoBERTa."""
    return RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        intermediate_size=4 * width,
        max_position_embeddings=514,
        pad_token_id=_PAD,
    )


def decoder(layers: int, width: int, inner: int, vocabulary: int) -> PreTrainedConfig:
    """A decoder like Llama 3: four query heads to one of keys and values. Below 4096 it shares its embeddings."""
    heads = max(4, width // (_HEAD_WIDTH if width < 4096 else 2 * _HEAD_WIDTH))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        intermediate_size=inner,
        max_position_embeddings=8192,
        tie_word_embeddings=width < 4096,
        pad_token_id=_PAD,
    )


SIZES: dict[str, Callable[[], PreTrainedConfig]] = {
    "encoder tiny": lambda: encoder(2, 64, 300),
    "decoder tiny": lambda: decoder(2, 64, 128, 300),
    "encoder 0.4B": lambda: encoder(24, 1024, 50_265),
    "decoder 1B": lambda: decoder(16, 2048, 8192, 128_256),
    "decoder 8B": lambda: decoder(32, 4096, 14_336, 128_256),
}
"""RoBERTa-large, Llama 3.2 1B and Llama 3.1 8B, and two for tests."""


def random_model(config: PreTrainedConfig, task: str, compute: ComputePolicy) -> AdapterModel:
    """A model of this configuration with LoRA of rank 8 on every linear layer, the same whenever it is made.

    Args:
        config: Used up.
        task: text-classification or causal-lm.
        compute: Where, and in what precision.

    Raises:
        ConfigError: There is no such device here.
    """
    device, kind = prepare_device(compute), adapter_of(_ALL_LINEAR)
    made = task_named(task, ("a", "b") if task == "text-classification" else ())
    made.configure(config)
    config.use_cache = False
    builder: Any = getattr(transformers, made.traits.model)
    with repeatable(), device:
        base: PreTrainedModel = builder.from_config(config, dtype=dtype_of(compute))
    if compute.quantization == "4bit":
        _in_four_bits(base, compute, device)
    new = [name for name, _ in base.named_parameters() if not name.startswith(f"{base.base_model_prefix}.")]
    report = {"missing_keys": new, "mismatched_keys": [], "unexpected_keys": [], "error_msgs": []}
    head = Head() if made.traits.generates else find_head(base, report, made, Path(type(config).__name__))
    with repeatable():
        model, slots = attach(Host(base, head, made.traits.peft), _ALL_LINEAR.kind, kind)
    keep_float32(model, slots)
    if compute.gradient_checkpointing:
        recompute_layers(model)
    return AdapterModel(model, None, slots, scale_of(_ALL_LINEAR, kind), device, made, head, kind)


def _in_four_bits(base: PreTrainedModel, compute: ComputePolicy, device: torch.device) -> None:
    """Put NF4 layers in the place of linear ones, one after the other, as loading a checkpoint would."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(base.named_modules()):
        if not (isinstance(layer, nn.Linear) and is_quantised(name, layer)):
            continue
        few = Linear4bit(
            layer.in_features,
            layer.out_features,
            False,
            compute_dtype=dtype_of(compute),
            quant_type="nf4",
            device="meta",
        )
        few.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        few.bias = layer.bias
        base.set_submodule(name, few.to(device))
    base.is_loaded_in_4bit = True  # PEFT looks here for which layer of LoRA it needs
