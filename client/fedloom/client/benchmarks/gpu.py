"""What a private step costs on a GPU, in time, memory and exactness, on models of real sizes with random weights."""

import copy
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom.client.benchmarks.one_pass import bench_one_pass
from fedloom.client.benchmarks.random_models import SIZES, random_model
from fedloom.client.benchmarks.step import VARIANTS, Batch, Step, draw_noise
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.training.device import choose_device, on_device, out_of_memory

__all__ = ["CASES", "TINY", "Case", "bench_gpu", "clipped_sum_error"]

_REPEATS = 20
_SHARE = 0.5
"""Of the time that is left, which one case may take."""


@dataclass(frozen=True)
class Case:
    """One model and what is done with it."""

    size: str
    batch: int
    length: int
    """Tokens of each example."""
    compute: dict[str, Any] = field(default_factory=dict)
    """Keys of [compute]."""
    variants: tuple[str, ...] = ("plain", "ours")

    @property
    def task(self) -> str:
        """What the model is for."""
        return "text-classification" if self.size.startswith("encoder") else "causal-lm"

    @property
    def name(self) -> str:
        """The size, and how the base is kept."""
        kept = [
            str(value) for key, value in self.compute.items() if key != "gradient_checkpointing" and value != "none"
        ]
        return ", ".join([self.size, *kept] + (["recomputed"] if self.compute.get("gradient_checkpointing") else []))


_HALF = {"dtype": "bfloat16"}
_LEAN = {**_HALF, "gradient_checkpointing": True}
_WITH_OPACUS = ("plain", "ours", "opacus_ghost")

CASES = (
    Case("encoder 0.4B", 32, 128, _HALF, _WITH_OPACUS),
    Case("decoder 1B", 8, 512, _HALF, _WITH_OPACUS),
    Case("decoder 8B", 4, 512, {**_LEAN, "quantization": "4bit"}),
    Case("decoder 8B", 4, 512, _LEAN),
    Case("encoder 0.4B", 32, 128, {}, _WITH_OPACUS),
    Case("decoder 1B", 8, 512, _LEAN),
)
"""The most important first."""

TINY = (
    Case("encoder tiny", 4, 16, _HALF, _WITH_OPACUS),
    Case("decoder tiny", 2, 16, {}, _WITH_OPACUS),
    Case("decoder tiny", 2, 16, {**_LEAN, "quantization": "4bit"}),
)
"""For seeing that everything runs."""


def bench_gpu(*, minutes: float, tiny: bool = False) -> dict[str, Any]:
    """Measure this machine's GPU, for at most about so many minutes.

    Args:
        minutes: A case is not begun when they are over, and ends early when half of what was left has passed.
        tiny: Tiny models on whatever device there is, to see that everything runs.

    Returns:
        device: what it ran on. exactness: for each tiny model the relative L2 error of the clipped sum in float32
        against float64 on the CPU. cases: for each its sizes and, of each variant, the median milliseconds of a step,
        tokens in a second and, on CUDA, peak_gib, the most that the model and a step take; ratio_ours and
        ratio_opacus_ghost, medians over the repetitions of the time over the plain step's beside it; noise_ms and
        noise_share, of our step. one_pass: see `bench_one_pass`. A case that was left out says why under skipped.

    Raises:
        ConfigError: There is no CUDA device here, and the models are not tiny.
    """
    end = time.monotonic() + 60 * minutes
    device = choose_device("auto" if tiny else "cuda")
    exactness = {size: clipped_sum_error(size, device) for size in ("encoder tiny", "decoder tiny")}
    cases = [_measured(case, device, end) for case in (TINY if tiny else CASES)]
    one_pass = bench_one_pass(device, end, tiny=tiny) if time.monotonic() < end else {"skipped": "no time was left"}
    return {
        "device": _about(device),
        "minutes": minutes,
        "exactness": exactness,
        "cases": cases,
        "one_pass": one_pass,
    }


def clipped_sum_error(size: str, device: torch.device) -> float:
    """How far the private step's clipped sum is from that of a naive loop in float64 on the CPU, relative in L2 norm.

    Each example's gradient is taken alone there, by plain autograd, and cut to a norm that cuts about half of them.
    """
    case = Case(size, 8, 16)
    model = random_model(SIZES[size](), case.task, ComputePolicy(device=str(device)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for slot in model.slots.values():  # a B of zeros would hide A
            slot.parameter.add_(0.1 * torch.randn(slot.parameter.shape, generator=generator).to(device))
    batch, parameters = _batch(model, case), model.trainable(model.schema.roles)
    places = {id(parameter): place for place, parameter in enumerate(model.model.parameters())}
    exact = copy.deepcopy(model.model).to("cpu", torch.float64)
    theirs = [list(exact.parameters())[places[id(parameter)]] for parameter in parameters]
    rows = []
    for row in range(case.batch):
        inputs = {name: value[row : row + 1] for name, value in batch.items() if name != "labels"}
        loss = model.task.loss(exact(**inputs).logits, batch["labels"][row : row + 1]).sum()
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, theirs)]))
    gradients = torch.stack(rows)
    norms = gradients.norm(dim=1)
    clip = float(norms.median())
    expected = (gradients * (clip / norms).clamp(max=1)[:, None]).sum(0)
    with recording(model.model, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = PrivateOptimizer(base, tape, Seeded(0), noise_multiplier=0.0, clip_norm=clip, expected_batch=1.0)
        tape.begin(case.batch)
        torch.autograd.backward(model.task.loss(model.logits(batch), on_device(batch["labels"], model.device)).sum())
        optimizer.accumulate()
        found = optimizer.clipped_sum.cpu().double()
    return float((found - expected).norm() / expected.norm())


def _batch(model: AdapterModel, case: Case) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape, classes = (case.batch, case.length), model.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(2, classes, shape, generator=generator)  # beyond the ids with a meaning
    labels = ids if model.task.traits.per_token else torch.randint(0, 2, shape[:1], generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _measured(case: Case, device: torch.device, end: float) -> dict[str, Any]:
    about = {"case": case.name, "batch": case.batch, "length": case.length}
    if time.monotonic() > end:
        return {**about, "skipped": "no time was left"}
    until = time.monotonic() + _SHARE * (end - time.monotonic())
    try:
        return about | _figures(case, device, until)
    except ModuleNotFoundError as error:
        return {**about, "skipped": f"{error.name} is not installed"}
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {**about, "skipped": "it does not fit into the memory"}


def _figures(case: Case, device: torch.device, until: float) -> dict[str, Any]:
    steps, failed, model, resident = _steps(case, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    noise: list[float] = []
    peaks: dict[str, float] = {}
    for repeat in range(_REPEATS + 1):
        for name, step in steps.items():
            with _peak(device) as peak:
                spent = _timed(step, device)
            if repeat:  # the first round warms up
                times[name].append(spent)
                peaks |= {f"{name}_peak_gib": (resident + each) / 2**30 for each in peak}
        noise.append(_timed(partial(draw_noise, model.schema.size, device), device))
        if repeat and time.monotonic() > until:
            break
    medians = {name: float(np.median(each)) for name, each in times.items()}
    plain, tokens = np.array(times["plain"]), case.batch * case.length
    figures: dict[str, Any] = {"parameters": _values(model), "trained": model.schema.size, "repeats": len(plain)}
    figures |= {f"ratio_{name}": float(np.median(np.array(times[name]) / plain)) for name in times if name != "plain"}
    figures |= {f"{name}_ms": each for name, each in medians.items()}
    figures |= {f"{name}_tokens_s": 1e3 * tokens / each for name, each in medians.items()}
    noise_ms = float(np.median(noise[1:]))
    return figures | peaks | failed | {"noise_ms": noise_ms, "noise_share": noise_ms / medians["ours"]}


class _Steps(NamedTuple):
    steps: dict[str, Step]
    failed: dict[str, str]
    """Why variants have none."""
    model: AdapterModel
    """Ours, which the plain step shares, since ours leaves nothing behind in it. Opacus has one of its own."""
    resident: int
    """Bytes that ours takes on CUDA."""


def _steps(case: Case, device: torch.device) -> _Steps:

    def made() -> AdapterModel:
        return random_model(SIZES[case.size](), case.task, ComputePolicy(device=str(device), **case.compute))

    before, failed = _allocated(device), {}
    model = made()
    resident = _allocated(device) - before
    steps = {name: VARIANTS[name](model, _batch(model, case)) for name in case.variants if name in ("plain", "ours")}
    for name in case.variants:
        if name in steps:
            continue
        theirs = made()
        step = VARIANTS[name](theirs, _batch(theirs, case))
        try:
            step()
            steps[name] = step
        except Exception as error:  # whatever another's code makes of a model; ours is measured all the same
            failed[f"{name}_failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return _Steps(steps, failed, model, resident)


def _timed(step: Step, device: torch.device) -> float:
    """Milliseconds until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return 1e3 * (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """On CUDA the most bytes that the block takes at a time, in the list when it ends; else an empty list."""
    found: list[int] = []
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device) - before)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _values(model: AdapterModel) -> int:
    """Values of the base model and the adapter; a byte of NF4 holds two."""
    return sum(each.numel() * (2 if each.dtype == torch.uint8 else 1) for each in model.model.parameters())


def _about(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= {"name": card.name, "memory_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
        about |= {"capability": f"{card.major}.{card.minor}", "driver": _driver()}
    return about


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
