"""A frozen base model in fewer bits, or with less kept of it, under an adapter that is exact."""

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from fedloom.client.adapters.api import Traits
from fedloom.client.adapters.slot import Slot
from fedloom.client.policy import ComputePolicy
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Role

__all__ = [
    "check_frozen",
    "dtype_of",
    "is_quantised",
    "keep_float32",
    "loading",
    "one_layer_whole",
    "recompute_layers",
    "saved_in_float32",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEADS = ["classifier", "score", "lm_head", "pooler", "head", "summary", "logits_proj", "pre_classifier"]
"""Layers that are left whole: heads are trained, or give scores whose small differences count."""


def check_frozen(compute: ComputePolicy, traits: Traits) -> None:
    """Refuse a base model of fewer bits under an adapter that needs all of them.

    Raises:
        ModelError: The adapter trains parts of the base itself.
    """
    if traits.trains_base and (compute.dtype, compute.quantization) != ("float32", "none"):
        raise ModelError(
            "this kind of adapter trains the base model's own parameters, or makes its own of them, which needs all of "
            'it in float32; set compute.dtype = "float32" and compute.quantization = "none"'
        )


def loading(compute: ComputePolicy, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` under which the frozen base is as the policy has it.

    Raises:
        ConfigError: Fewer bits are asked for without bitsandbytes.
    """
    dtype = dtype_of(compute)
    if compute.quantization == "none":
        return {"dtype": dtype}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'quantization = "{compute.quantization}" needs bitsandbytes, which is not installed; install '
            'fedloom[quantized], or set quantization = "none"'
        )
    # transformers compares modules by their full name's last part; without the list it would quantise some heads.
    skipped: dict[str, Any] = {"llm_int8_skip_modules": _HEADS}
    if compute.quantization == "4bit":
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        bits = BitsAndBytesConfig(load_in_4bit=True, **four, **skipped)
    else:
        # LLM.int8 picks the columns that it keeps whole by the largest values of the batch, so that one example would
        # change what another one gives. At 0 it picks none, and each row is rounded by its own largest value.
        bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, **skipped)
    return {"dtype": dtype, "quantization_config": bits, "device_map": {"": str(device)}}


def dtype_of(compute: ComputePolicy) -> torch.dtype:
    """The type of the frozen base's values, of those that have not fewer bits."""
    return _DTYPES[compute.dtype]


def is_quantised(name: str, module: nn.Module) -> bool:
    """Whether a module of a base model, by its full name, is one that `loading` gives few bits."""
    return isinstance(module, (nn.Linear, Conv1D)) and bool(should_convert_module(name, _HEADS))


def keep_float32(model: PeftModel, slots: list[Slot]) -> None:
    """Give every trained value 32 bits, and each head float32 input; a model all in float32 is left as it is.

    A step of SGD is often smaller than what bfloat16 can add to a weight, and an update is a difference of two values.
    """
    for slot in slots:
        slot.parameter.data = slot.parameter.data.float()
    if all(each.dtype == torch.float32 for each in model.parameters()):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack the weights of a CPU's layer for inference, through which no gradient goes back.
            module.support_avx512bf16_for_cpu = False
    heads = {slot.spec.name.rpartition(".")[0] for slot in slots if slot.spec.role == Role.HEAD}
    for name, module in model.named_modules():
        # Only the layers whose own parameters are trained: what a head does in between follows them.
        if name.replace(".modules_to_save.default", "") in heads and ".original_module" not in name:
            module.register_forward_pre_hook(_in_float32)


def saved_in_float32(base: PreTrainedModel, saved: Collection[str]) -> None:
    """Give the modules of a plain base model that PEFT saves by these names 32 bits, as `keep_float32` does."""
    for name, module in base.named_modules():
        if any(name == each or name.endswith(f".{each}") for each in saved):
            module.float().register_forward_pre_hook(_in_float32)


def _in_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        each.float() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in inputs
    )


def recompute_layers(model: nn.Module) -> None:
    """Have each transformer layer computed again in the backward pass.

    transformers does so in training mode only, which would switch dropout on.

    Raises:
        ModelError: The model has no layers of a kind that transformers can recompute.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "this base model has no layers that can be recomputed; set compute.gradient_checkpointing = false"
        )
    for layer in layers:
        # Set beside the class's method, where peft and the tape leave it alone: both change the linear layers within.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@contextmanager
def one_layer_whole(model: nn.Module) -> Iterator[None]:
    """Have one of the layers that are recomputed keep what it computes, as each does in its turn of a backward pass."""
    for layer in model.modules():
        recomputed = vars(layer).get("forward")
        if isinstance(recomputed, partial) and recomputed.func is checkpoint:
            layer.forward = recomputed.args[0]
            try:
                yield
            finally:
                layer.forward = recomputed
            return
    yield
