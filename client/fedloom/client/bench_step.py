"""What privacy costs a training step: plain LoRA, ours, and Opacus's hooks, interleaved in one process."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch.nn import functional as F

from fedloom.client.model import AdapterModel, load_model
from fedloom.client.privacy.entropy import System
from fedloom.client.privacy.optimizer import PrivateOptimizer
from fedloom.client.privacy.per_example import recording
from fedloom.proto.run import AdapterSection, ModelSection
from fedloom.proto.schema import Role

__all__ = ["bench_step"]

BATCH, LENGTH = 32, 64
_CLIP, _SIGMA, _RATE = 1.0, 1.0, 0.01
_ROLES = (Role.LORA_A, Role.LORA_B, Role.HEAD)

Step = Callable[[], None]


def bench_step(*, repeats: int) -> dict[str, Any]:
    """Time each variant `repeats` times in turn, one thread, CPU time of the process.

    Returns:
        ratio_ours and ratio_opacus_hooks: median over the repetitions of the variant's time over the plain
        step's time in the same repetition; and each variant's median in milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        adapter = AdapterSection(rank=8, targets=("query", "key", "value", "dense"))
        section = ModelSection(base="minilm-l6", labels=("a", "b"), max_length=LENGTH)
        # Opacus gets a model of its own: hooks that are switched off still slow a backward pass down.
        model, hooked = load_model(section, adapter), load_model(section, adapter)
        generator = torch.Generator().manual_seed(0)
        batch = {
            "input_ids": torch.randint(1000, 20_000, (BATCH, LENGTH), generator=generator),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "labels": torch.randint(0, 2, (BATCH,), generator=generator),
        }
        variants = {"plain": _plain(model, batch), "ours": _ours(model, batch), "opacus_hooks": _hooks(hooked, batch)}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(repeats + 1):
            for name, step in variants.items():
                began = time.process_time()
                step()
                if repeat:  # the first round warms caches up
                    times[name].append(1e3 * (time.process_time() - began))
    finally:
        torch.set_num_threads(threads)
    plain = np.array(times["plain"])
    figures: dict[str, Any] = {
        f"ratio_{name}": float(np.median(np.array(each) / plain)) for name, each in times.items() if name != "plain"
    }
    figures |= {f"{name}_ms": float(np.median(each)) for name, each in times.items()}
    return {**figures, "repeats": repeats, "batch": BATCH, "length": LENGTH, "threads": 1}


def _loss(model: AdapterModel, batch: dict[str, torch.Tensor], reduction: str) -> torch.Tensor:
    return F.cross_entropy(model.logits(batch), batch["labels"], reduction=reduction)


def _plain(model: AdapterModel, batch: dict[str, torch.Tensor]) -> Step:
    parameters = model.trainable(_ROLES)
    optimizer = torch.optim.SGD(parameters, lr=_RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(_loss(model, batch, "mean"))
        optimizer.step()

    return step


def _ours(model: AdapterModel, batch: dict[str, torch.Tensor]) -> Step:
    parameters = model.trainable(_ROLES)
    base = torch.optim.SGD(parameters, lr=_RATE)

    def step() -> None:
        # Entering the recording is part of the price: a round enters it once for all its steps.
        with recording(model.model, parameters) as tape:
            optimizer = PrivateOptimizer(
                base, tape, System(), noise_multiplier=_SIGMA, clip_norm=_CLIP, expected_batch=BATCH
            )
            tape.begin(BATCH)
            torch.autograd.backward(_loss(model, batch, "sum"))
            optimizer.accumulate()
            optimizer.release()

    return step


def _hooks(model: AdapterModel, batch: dict[str, torch.Tensor]) -> Step:
    parameters = model.trainable(_ROLES)
    base = torch.optim.SGD(parameters, lr=_RATE)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # Opacus records in training mode only, and ours trains without dropout
    model.model.train()
    GradSampleHooks(model.model, loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(base, noise_multiplier=_SIGMA, max_grad_norm=_CLIP, expected_batch_size=BATCH)

    def step() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(_loss(model, batch, "sum"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
