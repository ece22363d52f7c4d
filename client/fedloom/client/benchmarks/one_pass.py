"""Steps of many clients in one pass against the same steps in turn."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedloom.client.benchmarks.random_models import SIZES, random_model
from fedloom.client.data.tokens import Encoded
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.client.training.microbatch import Microbatch
from fedloom.client.training.one_pass.passes import Sample, gradients

__all__ = ["bench_one_pass"]

_EXAMPLES, _LENGTH, _REPEATS = 8, 128, 20
"""Eight examples are the fewest that a private pass has of a client, see `uniform_microbatches`."""


def bench_one_pass(device: torch.device, until: float, *, tiny: bool = False) -> dict[str, Any]:
    """Time a step of every client, in turn and in one pass, one after the other so that both see the same machine.

    A step is sampling's gradients, clipping, noise and the optimiser's step, of a BERT-like model with LoRA.

    Args:
        device: Where.
        until: Time of `time.monotonic` at which no further repetition is begun.
        tiny: A tiny model and four clients rather than 32, to see that it runs.

    Returns:
        clients, batch (examples of each) and length; of private and open steps in_turn_ms and one_pass_ms, medians in
        milliseconds for the steps of all clients, and speed_up, the median over the repetitions of their quotient.
    """
    size, clients, length = ("encoder tiny", 4, 16) if tiny else ("encoder 0.4B", 32, _LENGTH)
    lead = random_model(SIZES[size](), "text-classification", ComputePolicy(device=str(device)))
    lead.tokenizer = SimpleNamespace(pad_token_id=0)  # random models have none; these texts need no padding
    models = [lead.twin() for _ in range(clients)]
    found: dict[str, Any] = {"clients": clients, "batch": _EXAMPLES, "length": length}
    for name in ("private", "open"):
        found |= {f"{name}_{key}": value for key, value in _timed(models, length, name == "private", until).items()}
    return found


def _timed(models: list[AdapterModel], length: int, private: bool, until: float) -> dict[str, float]:
    with ExitStack() as stack:
        made = [_sample(stack, model, number, length, private) for number, model in enumerate(models)]

        def in_turn() -> None:
            for sample, step in made:
                gradients([sample], _EXAMPLES)
                step()

        def one_pass() -> None:
            gradients([sample for sample, _ in made], _EXAMPLES * len(made))
            for _, step in made:
                step()

        times = np.zeros((0, 2))
        for repeat in range(_REPEATS + 1):
            both = [_milliseconds(each, models[0].device) for each in (in_turn, one_pass)]
            times = np.vstack([times, both]) if repeat else times  # the first warms up
            if repeat and time.monotonic() > until:
                break
    medians, quotients = np.median(times, axis=0), times[:, 0] / times[:, 1]
    return {"in_turn_ms": medians[0], "one_pass_ms": medians[1], "speed_up": float(np.median(quotients))}


def _sample(
    stack: ExitStack, model: AdapterModel, number: int, length: int, private: bool
) -> tuple[Sample, Callable[[], object]]:
    """What a client needs the gradients of, and the step after them."""
    rng, parameters = np.random.default_rng(number), model.trainable(model.schema.roles)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    texts = tuple(rng.integers(2, vocabulary, length).astype(np.int32) for _ in range(_EXAMPLES))
    encoded, optimizer = Encoded(texts, rng.integers(0, 2, _EXAMPLES)), torch.optim.SGD(parameters, lr=1e-3)
    indices, microbatch = np.arange(_EXAMPLES), Microbatch(_EXAMPLES, model.device)
    if not private:
        return Sample(
            f"{number:02d}", model, encoded, indices, microbatch, length, None, parameters, _EXAMPLES
        ), optimizer.step
    tape = stack.enter_context(recording(model.model, parameters))
    ours = PrivateOptimizer(optimizer, tape, System(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=_EXAMPLES)
    return Sample(f"{number:02d}", model, encoded, indices, microbatch, length, ours), ours.release


def _milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """Until the device has done it."""
    for wait in (True, False):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if wait:
            began = time.perf_counter()
            work()
    return 1e3 * (time.perf_counter() - began)
