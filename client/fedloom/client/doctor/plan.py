"""What training will take of a machine's memory, part by part, before any weight is loaded.

The base model is built without values (fake tensors, which have a shape, a type and a device) and an example's forward
pass is run on it: what that would keep for the backward pass is counted, not guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.attach import adapter_of, attach
from fedloom.client.adapters.slot import Slot
from fedloom.client.data.tokens import collate
from fedloom.client.models.attention import padding_known
from fedloom.client.models.base_folder import resolve_base
from fedloom.client.models.load import empty_base
from fedloom.client.models.quantization import check_frozen, dtype_of, is_quantised, one_layer_whole, recompute_layers
from fedloom.client.optimizers.api import optimizer_of
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.made_up import made_up_rows
from fedloom.client.tasks.api import Task
from fedloom.client.training.device import free_bytes, kept_bytes, prepare_device
from fedloom.client.training.microbatch import example_size, room_for
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError

__all__ = ["MemoryPlan", "Part", "plan_memory"]

_PRIVATE, _PLAIN = 24, 4
"""Bytes of each trained value in a step: the gradient; in a private one also the whole-number sum and its noise (8
each), and the noised sum in float32."""


@dataclass(frozen=True)
class Part:
    """One kind of thing that memory is needed for."""

    name: str
    bytes: int
    on_host: bool = False
    """Whether it is in the CPU's memory whatever the device is."""


@dataclass(frozen=True)
class MemoryPlan:
    """All of a client's memory, and the micro-batch that it has room for."""

    device: torch.device
    free: int | None
    """Bytes that training may take there, before anything is loaded; None if nobody knows."""
    parts: tuple[Part, ...]
    microbatch: int
    """Examples at a time; 0 if not even one fits."""
    asked: int
    """What the run asks for at most."""

    @property
    def total(self) -> int:
        """Bytes on the device while it trains."""
        return sum(part.bytes for part in self.parts if not part.on_host)


def plan_memory(spec: Spec, compute: ComputePolicy, base: str | None = None) -> MemoryPlan:
    """Plan a client's memory.

    Args:
        spec: The run.
        compute: What of the machine may be used, and how the base model is kept.
        base: The base model's folder or name here; None takes the run's.

    Raises:
        ConfigError: There is no such device here, or the adapter's or optimiser's options are wrong.
        ModelError: There is no such base model, or the adapter is made from the base model's weights, so that nothing
            can be said before they are loaded.
    """
    device, kind, task = prepare_device(compute), adapter_of(spec.adapter), spec.model.built()
    check_frozen(compute, kind.traits)
    free = free_bytes(device, compute.memory_mib)
    empty = empty_base(resolve_base(base or spec.model.base), task, dtype_of(compute))
    try:
        # Where a head's values come from is nothing to plan, and could not be looked up.
        host = Host(empty.model, replace(empty.head, new=frozenset()), task.traits.peft)
        model, slots = attach(host, spec.adapter.kind, kind)
        frozen = _frozen_bytes(model, {slot.parameter for slot in slots}, compute)
        if compute.gradient_checkpointing:
            recompute_layers(model)
        each = example_size(_kept(model, slots, task, empty.reader, spec.model.max_length, device))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"the memory of adapter.kind = {spec.adapter.kind!r} on {type(empty.model).__name__} is known only once it "
            f"is loaded: {error}; examine the site with `fedloom doctor POLICY --run RUN`, which loads it"
        ) from error
    values = sum(slot.parameter.numel() for slot in slots)
    adapter = 4 * values + sum(4 * slot.parameter.numel() for slot in slots if slot.origin is not None)
    room = spec.train.microbatch if free is None else room_for(free - frozen - adapter, each)
    size = max(0, min(room, spec.train.microbatch))
    parts = (
        Part("base model", frozen),
        Part("adapter", adapter),
        Part("optimiser", _state_bytes(spec, slots) + (8 * values if spec.train.ema else 0)),
        Part("gradient, sum and noise" if spec.privacy.enabled else "gradient", values * _vector(spec)),
        Part(f"activations of {max(1, size)} examples", max(1, size) * each),
        Part("broadcast and update", 8 * values, on_host=True),
    )
    return MemoryPlan(device, free, parts, size, spec.train.microbatch)


def _vector(spec: Spec) -> int:
    return _PRIVATE if spec.privacy.enabled else _PLAIN


def _frozen_bytes(model: PeftModel, trained: set[nn.Parameter], compute: ComputePolicy) -> int:
    """What the base model takes once it is loaded as `compute` says; weights that are shared count once."""
    few: set[Any] = {  # LoRA's own layers among them, which are trained
        module.weight
        for name, module in model.get_base_model().named_modules()
        if compute.quantization != "none" and is_quantised(name.replace(".base_layer", ""), module)
    }
    whole: int = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for parameter in set(model.parameters()) - trained:
        if parameter in few and compute.quantization == "8bit":
            whole += parameter.numel() + 4 * len(parameter)  # a float32 scale for each row
        elif parameter in few:
            whole += parameter.numel() // 2 + 4 * -(-parameter.numel() // 64)  # and here for each 64 values
        else:
            whole += parameter.numel() * parameter.element_size()
    return whole


def _kept(model: PeftModel, slots: list[Slot], task: Task, reader: Any, length: int, device: torch.device) -> int:
    """Bytes that the forward pass of one example, the longest that the run has, keeps for the backward pass."""
    example = _example(task, reader, model, length)
    with padding_known(example.get("attention_mask")), FakeTensorMode(allow_non_fake_inputs=True):
        trained = {slot.parameter for slot in slots}
        for module, name, tensor in list(_tensors(model)):
            # A trained value has 32 bits whatever the base has, see `keep_float32`.
            dtype = torch.float32 if tensor in trained else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(fake, tensor in trained)
            else:
                module._buffers[name] = fake
        batch = {name: torch.zeros_like(each, device=device) for name, each in example.items()}
        model.eval()
        with one_layer_whole(model):
            return kept_bytes(lambda: task.loss(task.scores(model, batch).float(), batch["labels"]).sum(), model)


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield module, name, tensor


def _example(task: Task, reader: Any, model: PeftModel, length: int) -> dict[str, torch.Tensor]:
    """The longest made-up example, as a batch of one."""
    rows = made_up_rows(task, reader, model, length)
    longest = max(range(len(rows)), key=rows.length)
    return collate(rows, np.array([longest]), reader.pad_token_id)


def _state_bytes(spec: Spec, slots: list[Slot]) -> int:
    """What the optimiser keeps from step to step: one step is taken, on zeros of the adapter's shapes."""
    parameters = [nn.Parameter(torch.zeros(slot.parameter.shape)) for slot in slots]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = optimizer_of(spec.train).make([{"params": parameters, "lr": spec.train.learning_rate}], 0.0)
    optimizer.step()
    return sum(_nbytes(value) for state in optimizer.state.values() for value in state.values())


def _nbytes(value: object) -> int:
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return int(np.prod(value.shape)) * value.element_size() if isinstance(value, torch.Tensor) else 0
