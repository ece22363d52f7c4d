"""What a step's noise costs: by the CPU with AES, and in tensor operations on a device.

The two take turns, and the best of the repetitions counts, on one thread: CPU time of the process, or on CUDA the time
between two events. For the tensors it also counts the operations and the bytes that they read and write, which is what
a GPU's memory bounds.

    python benchmarks/noise.py
    python benchmarks/noise.py --device cuda --values 10000000
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedloom.client.privacy.dp_sgd.chacha import words
from fedloom.client.privacy.dp_sgd.noise import rounded_normal
from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.core.privacy.gaussian import UNITS, candidates

_NO_WORK = frozenset(
    {"as_strided", "detach", "empty", "expand", "lift_fresh", "select", "slice", "t", "unbind", "unsqueeze", "view"}
)
"""What only looks at a tensor in another way, or makes room for one."""


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts operations and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _NO_WORK:
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            self.operations += 1
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return result


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device, cpu, values = torch.device(given.device), torch.device("cpu"), given.values

    def stream() -> torch.Tensor:
        return words(os.urandom(32), 0, 2 * candidates(values), device)

    def tensors() -> torch.Tensor:
        return rounded_normal(partial(words, os.urandom(32), device=device), UNITS, values, device)

    kinds: dict[str, tuple[Callable[[], object], torch.device]] = {
        "AES and numpy on the CPU": (lambda: System().normal(UNITS, values), cpu),
        f"tensors on {device}": (tensors, device),
        "of them the key stream": (stream, device),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(given.repeats + 1):
        for name, (work, where) in kinds.items():
            times[name].append(seconds(work, where))
    console = Console()
    for name, each in times.items():
        console.print(f"{name:26} {min(each[1:]) / values * 1e9:6.1f} ns a value")
    for name, made in (("a draw", tensors), ("of it the key stream", stream)):
        with Work() as work:
            made()
        console.print(f"{name:26} {work.operations} operations, {work.bytes / values:,.0f} bytes a value")


if __name__ == "__main__":
    main()
