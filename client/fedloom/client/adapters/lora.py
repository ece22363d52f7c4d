"""LoRA: W = W0 + (alpha / r)·B·A on linear layers (Hu et al., ICLR 2022, arXiv 2106.09685).

GPT-2's Conv1D is a linear layer whose weight is stored transposed, (in, out). Its pair is like any other, A: r×in and
B: out×r; PEFT notes the storage as fan_in_fan_out.
"""

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.client.adapters.api import Slot, schema_name
from fedloom.proto.errors import ModelError
from fedloom.proto.run import AdapterSection
from fedloom.proto.schema import Role, TensorSpec

__all__ = ["attach", "linear_targets", "slots"]


def attach(base: PreTrainedModel, section: AdapterSection, task_type: str | None, bias: str = "none") -> PeftModel:
    """A PeftModel with one pair on every target layer; `bias` says which biases PEFT saves with it, none or all.

    Without a task type the module called classifier is saved with it.

    Raises:
        ModelError: No layer has one of the target names, or a target is not a linear layer.
    """
    names = linear_targets(base, section.targets)
    transposed = any(isinstance(base.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=names,
        lora_dropout=0.0,
        bias=bias,
        task_type=task_type,
        modules_to_save=None if task_type else ["classifier"],
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        # peft corrects the setting for each linear layer among Conv1D layers, and says so every time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return get_peft_model(base, config)


def linear_targets(base: PreTrainedModel, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers whose last name is one of `targets`.

    Raises:
        ModelError: A target name matches nothing; the message lists what the model has.
    """
    linear = {name: module for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    last = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(targets) - last)
    if unknown:
        raise ModelError(
            f"adapter.targets {', '.join(unknown)}: {type(base).__name__} has no such linear layer; "
            f"it has {', '.join(sorted(last))}"
        )
    return [name for name in linear if name.rpartition(".")[2] in targets]


def slots(model: PeftModel) -> list[Slot]:
    """The factors of every pair, A before B, in model order."""
    found: list[Slot] = []
    for name, parameter in model.named_parameters():
        for mark, role in ((".lora_A.", Role.LORA_A), (".lora_B.", Role.LORA_B)):
            if mark in name:
                module = name.partition(mark)[0].removeprefix("base_model.model.")
                spec = TensorSpec(schema_name(name), module, role, tuple(parameter.shape))
                found.append(Slot(spec, parameter))
    return found
