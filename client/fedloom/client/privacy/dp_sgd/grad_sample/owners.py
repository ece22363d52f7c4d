"""Which layers own the trained parameters, and what to do about those that cannot be trained privately."""

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedloom.core.errors import ModelError

__all__ = ["Owners", "names_of", "owners"]

Owners = dict[str, nn.Module]
"""Layers by name."""

_REMEDIES = (
    ("lora_embedding_", "LoRA on an embedding is not supported: leave the embedding out of adapter.targets"),
    ("lora_magnitude_vector", "DoRA's magnitudes are not supported by Opacus's hooks: use LoRA without DoRA"),
    ("ia3_", "PEFT's IA3 is not supported: use the adapter kind ia3"),
    ("prompt", "every example's gradient goes through the same prompt tokens, so that clipping would take the whole "
     "batch for one example: use LoRA"),
    ("BatchNorm", "batch norm mixes the examples of a batch: use a model with layer norm"),
    ("Embedding", "an embedding table is not supported: train LoRA on linear layers, and leave the table frozen"),
)  # fmt: skip
"""What a parameter's full name or its layer's type contains, and what to say; the first that fits."""


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Each parameter's name in the model, for messages; its shape if the model does not have it."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {each: known.get(each, f"one of shape {tuple(each.shape)}") for each in parameters}


def owners(model: nn.Module, names: dict[nn.Parameter, str], supported: Callable[[type[nn.Module]], object]) -> Owners:
    """The layers that own the parameters of `names`.

    Raises:
        ModelError: A layer is of a kind that is not supported, a parameter belongs to no layer, or the model mixes
            examples.
    """
    found: Owners = {}
    owned: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise ModelError(
                f"layer {name!r} ({type(module).__name__}) normalises over the batch, which mixes examples; "
                "use a model with layer norm, or put the layer in evaluation mode"
            )
        mine = [parameter for parameter in module.parameters(recurse=False) if parameter in names]
        if not mine:
            continue
        if not supported(type(module)):
            raise _refusal(name, module, names[mine[0]])
        found[name] = module
        owned.update(mine)
    strangers = [name for parameter, name in names.items() if parameter not in owned]
    if strangers:
        raise ModelError(
            f"{len(strangers)} trained parameters belong to no layer of the model, such as {strangers[0]!r}; "
            "train parameters of the model that is given"
        )
    return found


def _refusal(name: str, module: nn.Module, parameter: str) -> ModelError:
    kind = type(module).__name__
    text = f"{parameter} {kind}"
    remedy = next((what for mark, what in _REMEDIES if mark in text), "train linear layers, biases or layer norms")
    return ModelError(
        f"layer {name!r} ({kind}) owns the trained parameter {parameter!r} but has no per-example gradient here; "
        f"{remedy}"
    )
