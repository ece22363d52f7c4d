"""Where the networks go: behind the linear layers that attention and feed-forward blocks end with."""

from collections.abc import Callable
from typing import Literal

from peft import PeftModel
from torch import nn

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.lora import linear_targets
from fedloom.client.adapters.numbered_layers import Layers
from fedloom.client.adapters.wrapping import Wrapper, attach_around
from fedloom.core.errors import ModelError

__all__ = ["CANNOT_MERGE", "After", "attach_after"]

After = tuple[str, ...] | Literal["auto"]
"""Ends of the full names of linear layers, or the last ones of the attention and feed-forward blocks."""

CANNOT_MERGE = (
    "a network with an activation between its matrices cannot be folded into the base model's weights; export with "
    "format fedloom, and load the folder with fedloom.api.load_adapter"
)

_ENDS = (
    *("output.dense", "attention.dense", "ffn_output"),  # BERT, RoBERTa, ELECTRA, DeBERTa; ALBERT
    *("out_lin", "lin2", "attn.o", "Wo"),  # DistilBERT, MPNet, ModernBERT
    *("o_proj", "down_proj", "out_proj", "fc2", "self_attn.dense", "mlp.fc2"),  # Llama, Mistral, Qwen, Gemma; OPT; Phi
    *("c_proj", "dense_4h_to_h", "self_attention.dense"),  # GPT-2; GPT-NeoX; Falcon
)


def attach_after(host: Host, after: After, make: Callable[[nn.Module], Wrapper], layers: Layers = None) -> PeftModel:
    """A carrier of the head, with a wrapper around every layer that a block ends with.

    Args:
        host: The base model.
        after: Which layers.
        make: Makes the wrapper of one layer.
        layers: Numbers of the transformer layers that they are in; None is all.

    Raises:
        ModelError: The base model has none of these layers, or as raised by `make`.
    """
    linear = linear_targets(host.base, "all-linear", host.head, layers)
    wanted = _ENDS if after == "auto" else after
    names = [name for name in linear if any(f".{name}".endswith(f".{each}") for each in wanted)]
    missing = [each for each in wanted if not any(f".{name}".endswith(f".{each}") for name in names)]
    if (missing and after != "auto") or not names:
        what = "auto" if after == "auto" else ", ".join(missing)
        raise ModelError(
            f"adapter.after {what}: {type(host.base).__name__} has no such linear layer; its layers end in "
            f"{', '.join(sorted({_end(name) for name in linear}))}; name some of these"
        )
    return attach_around(host, tuple({name.rpartition(".")[2] for name in names}), make, layers, names)


def _end(name: str) -> str:
    """The last two words of a layer's name.

    >>> _end("bert.encoder.layer.0.attention.output.dense")
    'output.dense'
    """
    return ".".join(name.split(".")[-2:])
