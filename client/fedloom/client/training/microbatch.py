"""How many examples go through the model at a time: what memory allows, and fewer when it was too many."""

import logging
from collections.abc import Callable

import numpy as np
import torch

from fedloom.client.data.tokens import collate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.quantization import one_layer_whole
from fedloom.client.privacy.dp_sgd.probe import BatchLoss, made_up
from fedloom.client.training.device import free_bytes, kept_bytes, out_of_memory
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError

__all__ = ["Microbatch", "example_bytes", "example_size", "fitting", "room_for"]

log = logging.getLogger(__name__)

_BACKWARD = 2.0
"""Peak of a backward pass over what its forward pass has kept: each meets a gradient, and some a float32 copy."""

_SHARE = 0.8
"""Of the free memory; the rest is for what else the process does, and for fragments."""


class Microbatch:
    """A size that only ever falls.

    The DP-SGD step does not depend on it: a step is the sum of separately clipped gradients and one noise draw.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """`size`: examples at a time, at least 1."""
        self.size, self._device = size, device

    def attempt(self, count: int, work: Callable[[int], None]) -> None:
        """Call `work` with the size, and again with half of it for as long as memory runs out.

        Args:
            count: Examples that `work` is about.
            work: Begins from nothing whenever it is called, and draws no randomness.

        Raises:
            ModelError: Memory runs out with a single example.
        """
        while True:
            try:
                work(self.size)
                return
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if min(self.size, count) <= 1:
                    raise ModelError(
                        f"one example does not fit into the memory of {self._device} ({error}); end what else uses it, "
                        "set compute.gradient_checkpointing or compute.dtype, or ask for a run of shorter texts"
                    ) from error
            # Only here has the failed attempt let go of its tensors: the traceback held them. The sizes are those of
            # repeated halving, so they say little about the sample that was too large.
            self.size //= 2
            while self.size >= count > 1:
                self.size //= 2
            log.warning(
                "out of memory on %s: microbatches have at most %d examples from here on", self._device, self.size
            )
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def fitting(model: AdapterModel, loss: BatchLoss, spec: Spec, cap_mib: int | None, at_once: int = 1) -> int:
    """Examples at a time that memory has room for, from 1 to the run's `train.microbatch`.

    Found from a made-up text of the greatest length or a made-up picture: nothing of the private data goes into it.
    Where several trainers of this process train at once, each gets an equal part of what is free.
    """
    free = free_bytes(model.device, cap_mib)
    if free is None:
        return spec.train.microbatch
    if model.example_bytes is None:
        model.example_bytes = example_bytes(model, loss, spec)
    room = room_for(free // at_once, model.example_bytes)
    if room < 1:
        log.warning("%d MiB are free on %s and one example may need more", free >> 20, model.device)
    return max(1, min(room, spec.train.microbatch))


def example_bytes(model: AdapterModel, loss: BatchLoss, spec: Spec) -> int:
    """Bytes that training takes for each example of a microbatch, at the run's greatest length.

    Raises:
        ModelError: Not even one example fits.
    """
    examples = made_up(model, spec.model.max_length)
    # Pictures have one size; of texts the longest counts.
    longest = max(range(len(examples)), key=examples.length)
    batch = collate(examples, np.array([longest]), model.tokenizer.pad_token_id)
    before = [(slot.parameter, slot.parameter.requires_grad) for slot in model.slots.values()]
    model.trainable(model.schema.roles)
    kept = 0

    def measure(_: int) -> None:
        nonlocal kept
        with one_layer_whole(model.model):
            kept = kept_bytes(lambda: loss(batch), model.model)

    try:
        Microbatch(1, model.device).attempt(1, measure)
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
    return example_size(kept)


def example_size(kept: int) -> int:
    """Bytes that training takes for an example whose forward pass keeps so many for the backward pass."""
    return max(1, int(_BACKWARD * kept))


def room_for(free: int, example: int) -> int:
    """Examples of so many bytes that go into so many that are free."""
    return int(_SHARE * free / example)
