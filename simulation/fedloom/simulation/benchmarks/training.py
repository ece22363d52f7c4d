"""What a simulated round of training costs beside the plainest loop that does the same: transformers, PEFT and SGD."""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedloom.client.data.rows import Rows
from fedloom.client.models.base_folder import resolve_base
from fedloom.client.models.loading_context import LOCAL_ONLY, quiet
from fedloom.client.models.start import start_of
from fedloom.core.config.run import RunConfig
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Given, build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock

__all__ = ["Work", "bench_training", "simulated"]

_BASE, _LABELS, _RANK, _RATE = "minilm-l6", ("a", "b"), 8, 0.01
_LAST = (-2, -1)
"""Layers with adapters where what is below them is computed once."""
_WORDS = ("ward", "fever", "dose", "night", "clear", "left", "old", "slow", "pain", "well", "lung", "blood", "rest")

Round = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What every client does in a round: so many steps on all its rows."""

    clients: int = 20
    steps: int = 2
    batch: int = 16
    length: int = 32
    layers: tuple[int, ...] | None = None
    """Layers with adapters; None is all."""
    private: bool = False


def bench_training(work: Work, *, repeats: int) -> dict[str, Any]:
    """Time each variant `repeats` times in turn, one thread, CPU time of the process.

    Returns:
        ratio_to_bare_loop: median over the repetitions of a simulated round's time over that of the bare loop in the
        same repetition. ratio_to_bare_loop_cached: the same round with adapters on the last two layers, where what the
        others give is computed once for each example, over the same bare loop; ratio_cached_like_for_like: over a loop
        with adapters on the last two layers, too. private_ratio and private_ratio_cached: a private round over an open
        one. And each variant's median in milliseconds.
    """
    last = replace(work, layers=_LAST)
    bare = {"bare": work, "bare_last": last}
    ours = {
        "open": work,
        "private": replace(work, private=True),
        "open_last": last,
        "private_last": replace(last, private=True),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder, ExitStack() as stack:
            rounds = {name: _bare(each) for name, each in bare.items()}
            rounds |= {name: simulated(stack, Path(folder, name), each, repeats + 2) for name, each in ours.items()}
            times = _times(rounds, repeats)
    finally:
        torch.set_num_threads(threads)
    ratios = {
        "ratio_to_bare_loop": _ratio(times, "open", "bare"),
        "ratio_to_bare_loop_cached": _ratio(times, "open_last", "bare"),
        "ratio_cached_like_for_like": _ratio(times, "open_last", "bare_last"),
        "private_ratio": _ratio(times, "private", "open"),
        "private_ratio_cached": _ratio(times, "private_last", "open_last"),
    }
    medians = {f"{name}_ms": float(np.median(each)) for name, each in times.items()}
    shape = {"clients": work.clients, "steps": work.steps, "batch": work.batch, "length": work.length}
    return {**ratios, **medians, "repeats": repeats, **shape, "base": _BASE, "rank": _RANK, "threads": 1}


def _times(rounds: dict[str, Round], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repetition; a round before them warms up, and computes what is computed once."""
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat in range(repeats + 1):
        for name, round in rounds.items():
            began = time.process_time()
            round()
            if repeat:
                times[name].append(1e3 * (time.process_time() - began))
    return times


def _ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return float(np.median(np.array(times[one]) / np.array(times[other])))


def _bare(work: Work) -> Round:
    """The clients in turn: load the adapter, take the steps, read the adapter; and the mean of all in the end."""
    folder = resolve_base(_BASE)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers in a way that will go
        plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(_LABELS), **LOCAL_ONLY)
        chosen = None if work.layers is None else [each % plain.config.num_hidden_layers for each in work.layers]
        pairs = {"r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": ["query", "value"]}
        config = LoraConfig(**pairs, task_type="SEQ_CLS", layers_to_transform=chosen)
        model = get_peft_model(plain, config).eval()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    generator = torch.Generator().manual_seed(0)
    shape = (work.clients, work.batch, work.length)
    texts = torch.randint(1000, 20_000, shape, generator=generator)
    labels = torch.randint(0, len(_LABELS), shape[:2], generator=generator)
    mask = torch.ones(shape[1:], dtype=torch.long)
    current = {name: each.detach().clone() for name, each in trained.items()}

    def round() -> None:
        total = {name: torch.zeros_like(each) for name, each in current.items()}
        for client in range(work.clients):
            with torch.no_grad():
                for name, each in trained.items():
                    each.copy_(current[name])
            optimizer = torch.optim.SGD(trained.values(), lr=_RATE)
            for _ in range(work.steps):
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(model(texts[client], attention_mask=mask, labels=labels[client]).loss)
                optimizer.step()
            with torch.no_grad():
                for name, each in trained.items():
                    total[name] += each / work.clients
        current.update(total)

    return round


def simulated(stack: ExitStack, folder: Path, work: Work, rounds: int) -> Round:
    """A federation in this process, one round at each call: sampling, ledgers, codecs, log and commit are all there.

    Args:
        stack: Closes what is opened.
        folder: Does not exist yet.
        work: What is done in a round.
        rounds: How many there can be.
    """
    folder.mkdir()
    config = completed(_config(work, rounds))
    federation = build(config, folder, _made_up(work))
    coordinator = Coordinator(
        config,
        federation.model.schema,
        build_strategy(config),
        stack.enter_context(Store(folder / "state", durable=False)),
        starting=start_of(config, federation.model),
        clock=standing_clock,
        expect=work.clients,
    )
    running: Iterator[None] = run_inprocess(federation, coordinator)

    def round() -> None:
        before = coordinator.progress.round
        while coordinator.progress.round == before:
            next(running)

    return round


def _config(work: Work, rounds: int) -> RunConfig:
    """A run in which every step takes all rows of every client."""
    lora: dict[str, Any] = {"kind": "lora", "rank": _RANK, "alpha": 2.0 * _RANK, "targets": ["query", "value"]}
    return RunConfig.model_validate(
        {
            "run": {"name": "bench", "rounds": rounds},
            "model": {"base": _BASE, "labels": _LABELS, "max_length": work.length, "head": "train"},
            "adapter": lora if work.layers is None else lora | {"layers": list(work.layers)},
            "train": {
                "steps": work.steps,
                "sampling_rate": 1.0,
                "microbatch": work.batch,
                "optimizer": "sgd",
                "learning_rate": _RATE,
                "head_learning_rate": _RATE,
            },
            "privacy": {"enabled": work.private, "epsilon": 8.0, "delta": 1e-3},
            "strategy": {"name": "fedavg"},
            "rounds": {"min_clients": work.clients},
        }
    )


def _made_up(work: Work) -> Given:
    """Rows of made-up sentences, each longer than what is kept of it."""
    rng = np.random.default_rng(0)
    width = len(str(work.clients - 1))
    names = [f"client-{client:0{width}d}" for client in range(work.clients)]
    return Given({name: _rows(rng, work.batch, work.length) for name in names}, _rows(rng, 2, work.length))


def _rows(rng: np.random.Generator, count: int, length: int) -> Rows:
    texts = tuple(" ".join(rng.choice(_WORDS, 2 * length)) for _ in range(count))
    return Rows(texts, rng.integers(0, len(_LABELS), count), ("",) * count, _LABELS)
