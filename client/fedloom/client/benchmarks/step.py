"""What privacy costs a training step in time and memory: plain LoRA, ours, Opacus's hooks, its ghost clipping."""

import ctypes
import gc
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.noise import noise
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.client.tasks.api import Task
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.privacy.gaussian import deviation
from fedloom.core.runtime.memory import clear_peak, keep_freed_memory, status_bytes

__all__ = ["VARIANTS", "Batch", "Step", "bench_step", "draw_noise", "peak_bytes"]

BATCH, LENGTH = 32, 64
_CLIP, _SIGMA, _RATE = 1.0, 1.0, 0.01

Batch = dict[str, torch.Tensor]
Step = Callable[[], None]


def bench_step(*, repeats: int) -> dict[str, Any]:
    """Time each variant `repeats` times in turn, one thread, CPU time of the process; then their peak memory.

    Returns:
        ratio_ours and so on: median over the repetitions of the variant's time over the plain step's time in the
        same repetition; each variant's median in milliseconds; noise_ms, the median time to draw a step's noise, and
        noise_share, its share of our step; and, where the system tells it, peak_memory_ratio_ours and so on: the median
        `peak_bytes` of at most three over that of the plain step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _times(repeats)
    finally:
        torch.set_num_threads(threads)
    plain = np.array(times["plain"])
    others = [name for name in VARIANTS if name != "plain"]
    figures: dict[str, Any] = {f"ratio_{name}": float(np.median(np.array(times[name]) / plain)) for name in others}
    figures |= {f"{name}_ms": float(np.median(each)) for name, each in times.items()}
    figures["noise_share"] = figures["noise_ms"] / figures["ours_ms"]
    if _CLEAR_PEAK.exists():
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            # Up to three, for a median: where the allocator puts things moves the peak by some percent.
            runs = [
                {name: fresh.submit(peak_bytes, name).result() for name in VARIANTS} for _ in range(min(3, repeats))
            ]
        peaks = {name: float(np.median([run[name] for run in runs])) for name in VARIANTS}
        figures |= {f"peak_memory_ratio_{name}": peaks[name] / peaks["plain"] for name in others}
        figures |= {f"{name}_peak_mib": peak / 2**20 for name, peak in peaks.items()}
    return {**figures, "repeats": repeats, "batch": BATCH, "length": LENGTH, "threads": 1}


def _times(repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repetition."""
    # Each variant has a model of its own: hooks that are switched off still slow a backward pass down.
    steps = {name: build(_model(), _batch()) for name, build in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    noise: list[float] = []
    width = _model().schema.size
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if repeat:  # the first round warms caches up
                times[name].append(1e3 * (time.process_time() - began))
        # Beside the steps, so that both see the machine at the same speed.
        began = time.process_time()
        draw_noise(width, torch.device("cpu"))
        noise.append(1e3 * (time.process_time() - began))
    return {**times, "noise": noise[1:]}


def draw_noise(width: int, device: torch.device) -> None:
    """Draw the noise of one step of so many trained values, and have it on the device."""
    noise(System(), deviation(_SIGMA), width, device)


_CLEAR_PEAK = Path("/proc/self/clear_refs")


def peak_bytes(variant: str) -> int:
    """Most memory that a step takes above what the process holds between steps. Meant for a fresh process.

    The kernel keeps the peak of the resident set (VmHWM), so this counts every buffer of every library, but not what
    was asked for and never touched. A first step sets up what stays: code pages, the libraries' own buffers, the
    optimiser's state. Then freed memory is given back and the peak is set to the present (proc(5), clear_refs).
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    step = VARIANTS[variant](_model(), _batch())
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear_peak()
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def _model() -> AdapterModel:
    adapter = AdapterSection(rank=8, targets=("query", "key", "value", "dense"))
    return load_model(ModelSection(base="minilm-l6", labels=("a", "b"), max_length=LENGTH), adapter)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 20_000, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator),
    }


class _Loss(nn.Module):
    """A task's loss of each example, as Opacus has them from a criterion of torch."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.reduction = task, "sum"

    def forward(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.task.loss(scores, labels.to(scores.device))


def _loss(model: AdapterModel, batch: Batch) -> torch.Tensor:
    """The sum over the examples."""
    return torch.sum(_Loss(model.task)(model.logits(batch), batch["labels"]))


def _plain(model: AdapterModel, batch: Batch) -> Step:
    parameters = model.trainable(model.schema.roles)
    optimizer = torch.optim.SGD(parameters, lr=_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(_loss(model, batch) / len(batch["labels"]))
        optimizer.step()

    return step


def _ours(model: AdapterModel, batch: Batch) -> Step:
    parameters = model.trainable(model.schema.roles)
    base = torch.optim.SGD(parameters, lr=_RATE)

    def step() -> None:
        # Entering the recording is part of the price: a round enters it once for all its steps.
        with recording(model.model, parameters) as tape:
            optimizer = PrivateOptimizer(
                base, tape, System(), noise_multiplier=_SIGMA, clip_norm=_CLIP, expected_batch=len(batch["labels"])
            )
            tape.begin(len(batch["labels"]))
            torch.autograd.backward(_loss(model, batch))
            optimizer.accumulate()
            optimizer.release()

    return step


def _for_opacus(model: AdapterModel) -> nn.Module:
    """The model in training mode, without dropout: Opacus records in that mode only, and ours has no dropout."""
    for module in model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole: nn.Module = model.model.train()
    return whole


def _hooks(model: AdapterModel, batch: Batch) -> Step:
    base = torch.optim.SGD(model.trainable(model.schema.roles), lr=_RATE)
    GradSampleHooks(_for_opacus(model), loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(
        base, noise_multiplier=_SIGMA, max_grad_norm=_CLIP, expected_batch_size=len(batch["labels"])
    )

    def step() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(_loss(model, batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ghost(model: AdapterModel, batch: Batch) -> Step:
    base = torch.optim.SGD(model.trainable(model.schema.roles), lr=_RATE)
    hooks = GradSampleHooksFastGradientClipping(
        _for_opacus(model), loss_reduction="sum", strict=False, max_grad_norm=_CLIP
    )
    optimizer = DPOptimizerFastGradientClipping(
        base,
        noise_multiplier=_SIGMA,
        max_grad_norm=_CLIP,
        expected_batch_size=len(batch["labels"]),
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(hooks, optimizer, _Loss(model.task), "sum")

    def step() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            criterion(model.logits(batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


VARIANTS = {"plain": _plain, "ours": _ours, "opacus_hooks": _hooks, "opacus_ghost": _ghost}
"""A training step of each kind, made of a model and a batch. Opacus's need a model of their own."""
