"""Many simulated clients in one process: how many are done in a second, and whether memory grows with their number."""

import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom.core.runtime.memory import keep_freed_memory, peak_bytes
from fedloom.simulation.benchmarks.training import Work, simulated

__all__ = ["bench_population"]

_FEWER = 10
"""The other federation, beside which memory is measured, has a tenth of the clients."""


def bench_population(work: Work, *, rounds: int, threads: int) -> dict[str, Any]:
    """Simulate so many clients for so many rounds, and a tenth of them, each in a process of its own. Linux only.

    Returns:
        clients_per_s: clients trained in a second of the rounds, by the clock on the wall; start_s: until the first
        round begins, with every client's data and policy made; peak_mib: most memory the process held;
        memory_ratio: that over the peak with a tenth of the clients.
    """
    many = _run(work, rounds, threads)
    few = _run(replace(work, clients=max(1, work.clients // _FEWER)), rounds, threads)
    shape = {"steps": work.steps, "batch": work.batch, "length": work.length, "private": work.private}
    ratio = {"memory_ratio": many["peak_mib"] / few["peak_mib"], "peak_mib_of_a_tenth": few["peak_mib"]}
    return {**many, **ratio, "clients": work.clients, "rounds": rounds, **shape, "threads": threads}


def _run(work: Work, rounds: int, threads: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, rounds, threads))


def _measured(work: Work, rounds: int, threads: int) -> dict[str, float]:
    keep_freed_memory()  # as `fedloom simulate` does
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder, ExitStack() as stack:
        began = time.perf_counter()
        round = simulated(stack, Path(folder, "run"), work, rounds + 1)
        ready = time.perf_counter()
        for _ in range(rounds):
            round()
        seconds = time.perf_counter() - ready
    return {
        "clients_per_s": work.clients * rounds / seconds,
        "start_s": ready - began,
        "peak_mib": peak_bytes() / 2**20,
    }
