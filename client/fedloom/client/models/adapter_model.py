"""The resident model: the base is loaded once and stays on the device; a round swaps the adapter only."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from fedloom.client.adapters.api import Adapter
from fedloom.client.adapters.head import Head
from fedloom.client.adapters.lora import LoRA
from fedloom.client.adapters.slot import Slot
from fedloom.client.data.tokens import Encoded
from fedloom.client.models.attention import padding_known
from fedloom.client.tasks.api import Task
from fedloom.client.training.device import on_device
from fedloom.core.errors import ModelError
from fedloom.core.peft_settings import PREFIX
from fedloom.core.schema import Array, Schema, Tensors, linear_name

__all__ = ["AdapterModel"]

_NO_HEAD, _PAIRS = Head(), LoRA()


class AdapterModel:
    """A frozen base model with a swappable adapter.

    Dropout is off in training too: an example's gradient is then a function of the example and the
    parameters alone, whatever else is in its batch.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        slots: list[Slot],
        scale: float,
        device: torch.device,
        task: Task,
        head: Head = _NO_HEAD,
        adapter: Adapter = _PAIRS,
    ) -> None:
        """Use `load_model`; the parts must belong together."""
        self.task, self.head, self.adapter = task, head, adapter
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        """What turns rows into the model's numbers; of a model of pictures their `ImageProcessor`."""
        self.device = device
        self.slots = {slot.spec.name: slot for slot in slots}
        self.schema = Schema(tuple(slot.spec for slot in slots), scale)
        self._base_weights: dict[str, torch.Tensor] = {}
        self.corrections: dict[str, Array] = {}
        """What the frozen weights carry beside their pretrained values, by the names of a broadcast."""
        self.rank = self.schema.rank
        self.probed = False
        """Whether the sensitivity probe has passed on this model, see `privacy.probe`."""
        self.example_bytes: int | None = None
        """Memory that one example takes in training; None until it is measured, see `fitting`."""
        self._initial = self.read(self.schema)

    def load(self, tensors: Tensors, rank: int | None = None) -> None:
        """Put adapter values in place; low-rank factors below the schema's rank are padded with zeros.

        Args:
            tensors: Values by schema name; names left out keep their value.
            rank: Rank the client works at from now on; None is the schema's.
        """
        self.rank = rank or self.schema.rank
        with torch.no_grad():
            for name, value in tensors.items():
                if name in self.slots:
                    slot, target = self.slots[name], self.padded(name, value)
                    slot.parameter.copy_(target if slot.origin is None else slot.origin.to(target) + target)
            for pair in self.schema.pairs:
                if f"{pair.module}.base_A" in tensors:
                    self._correct(pair.module, tensors)

    def padded(self, name: str, value: Array) -> torch.Tensor:
        """A value for the schema's tensor `name` as its parameter has it, with zeros beyond its own rank."""
        target = torch.zeros_like(self.slots[name].parameter)
        target[tuple(slice(0, size) for size in value.shape)] = torch.from_numpy(np.array(value)).to(target)
        return target

    def linear_terms(self, broadcast: Tensors) -> dict[nn.Parameter, torch.Tensor]:
        """What a broadcast adds to the gradients of parameters, see `Assignment.linear`."""
        return {
            slot.parameter: self.padded(name, broadcast[linear_name(name)])
            for name, slot in self.slots.items()
            if linear_name(name) in broadcast
        }

    def show(self, tensors: Tensors, rank: int | None = None) -> None:
        """Be the model of a broadcast or a result: frozen weights it does not correct have their pretrained values.

        Args:
            tensors: Values and corrections by name; of the adapter, names left out keep their value.
            rank: As for `load`.
        """
        with torch.no_grad():
            for module, pretrained in self._base_weights.items():
                self.model.get_submodule(f"{PREFIX}{module}").base_layer.weight.data = pretrained
        self.corrections = {}
        self.load(tensors, rank)

    def reset(self, words: Iterable[str], rank: int | None = None) -> None:
        """Put the tensors that `words` select back to the values they had when the model was loaded, cut to `rank`."""
        schema = self.schema if rank is None else self.schema.with_rank(rank)
        cut = {s.name: tuple(slice(0, size) for size in s.shape) for s in schema.select(words).tensors}
        self.load({name: self._initial[name][part] for name, part in cut.items()}, rank)

    def _correct(self, module: str, tensors: Tensors) -> None:
        """Set a frozen weight to its pretrained value plus scale·base_B·base_A."""
        layer: Any = self.model.get_submodule(f"{PREFIX}{module}")
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            raise ModelError(
                "this run's strategy corrects the frozen base model, which cannot be done to quantised weights; set "
                'compute.quantization = "none", with compute.dtype = "bfloat16" to save memory'
            )
        pretrained = self._base_weights.setdefault(module, weight.detach())
        self.corrections |= {name: np.array(tensors[name]) for name in (f"{module}.base_B", f"{module}.base_A")}
        left, right = (torch.from_numpy(self.corrections[f"{module}.base_{side}"]) for side in "BA")
        correction = self.schema.scale * (left.to(weight) @ right.to(weight))
        # In the place of the pretrained values and not over them: a twin may compute with these.
        weight.data = pretrained + (correction.t() if layer.fan_in_fan_out else correction)

    def read(self, schema: Schema) -> dict[str, Array]:
        """The current values of the tensors of `schema`, at its shapes, float32."""
        values: dict[str, Array] = {}
        for spec in schema.tensors:
            slot = self.slots[spec.name]
            value = slot.parameter.detach()
            value = value if slot.origin is None else value - slot.origin.to(value)
            cut = value[tuple(slice(0, size) for size in spec.shape)]
            values[spec.name] = cut.to("cpu", torch.float32, copy=True).numpy()
        return values

    def trainable(self, words: Iterable[str]) -> list[nn.Parameter]:
        """Make exactly the tensors that `words` select require gradients, and return their parameters in wire order."""
        wanted = self.schema.names(*words)
        chosen: list[nn.Parameter] = []
        for slot in self.slots.values():
            slot.parameter.requires_grad_(slot.spec.name in wanted)
            slot.parameter.grad = None
            if slot.spec.name in wanted:
                chosen.append(slot.parameter)
        return chosen

    def parameters_of(self, words: Iterable[str]) -> frozenset[nn.Parameter]:
        """The parameters that hold the tensors that `words` select."""
        return frozenset(self.slots[spec.name].parameter for spec in self.schema.select(words).tensors)

    def rank_masks(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
        """1 within the current rank and 0 beyond, for the low-rank factors among `parameters`; empty at full rank."""
        if self.rank >= self.schema.rank:
            return {}
        cut = {spec.name: spec.shape for spec in self.schema.with_rank(self.rank).tensors}
        masks: dict[nn.Parameter, torch.Tensor] = {}
        chosen = set(parameters)
        for name, slot in self.slots.items():
            if slot.parameter in chosen and cut[name] != slot.spec.shape:
                mask = torch.zeros_like(slot.parameter)
                mask[tuple(slice(0, size) for size in cut[name])] = 1.0
                masks[slot.parameter] = mask
        return masks

    def twin(self) -> "AdapterModel":
        """The same model with an adapter of its own, for another thread; the frozen weights take no memory again.

        Each may be trained, corrected and read whatever the other does. The model has no hooks at this moment.
        """
        trained = {id(slot.parameter) for slot in self.slots.values()}
        known: dict[int, Any] = {id(self.tokenizer): self.tokenizer}
        for parameter in self.model.parameters():
            if id(parameter) not in trained:
                # A parameter of its own: a correction gives it other values and leaves those that are shared.
                known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        return copy.deepcopy(self, known)

    def leave(self) -> None:
        """Go to the CPU, so that the device's memory is free for others."""
        self.model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.device = torch.device("cpu")

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What `Task.scores` says of a batch that `collate` has made, float32."""
        inputs = {name: on_device(value, self.device) for name, value in batch.items()}
        with padding_known(batch.get("attention_mask")):
            return self.task.scores(self.model, inputs).float()

    def prepared(self, encoded: Encoded) -> Encoded:
        """Rows with what the task computes once for each of them by the base model, see `Task.prepare`."""
        if type(self.task).prepare is Task.prepare:
            return encoded
        with self._as_loaded():
            return self.task.prepare(self, encoded)

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """Be the model as it was loaded, without anything that was trained; then as it was before."""
        rank, corrections, held = self.rank, dict(self.corrections), self.read(self.schema)
        self.show(self._initial)
        try:
            yield
        finally:
            self.show({**held, **corrections}, rank)
