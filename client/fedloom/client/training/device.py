"""What of this machine training may use: the device, its memory, and what fits in it."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedloom.client.policy import ComputePolicy
from fedloom.core.errors import ConfigError

__all__ = [
    "choose_device",
    "compute_of",
    "free_bytes",
    "kept_bytes",
    "on_device",
    "out_of_memory",
    "prepare_device",
    "shared",
]

_NO_MEMORY = ("out of memory", "can't allocate memory")
"""What torch says in a RuntimeError: CUDA's and MPS's allocators, and the CPU's."""

_CONTEXT = 600 << 20
"""Bytes that CUDA takes in each process beside what torch's allocator counts."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def choose_device(name: str) -> torch.device:
    """The device that compute.device of a policy or engine.device of a run file names. Nothing else chooses one.

    auto never takes MPS, on which the tests of per-example gradients have not been run; name it to use it.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise ConfigError(
            f"device = {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            'take "auto" or "cpu", or install the driver and a torch built for it'
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError('device = "mps": torch finds no Apple GPU here; take "auto" or "cpu"')
    return device


def prepare_device(compute: ComputePolicy) -> torch.device:
    """Put the policy's threads and memory cap into force for this process.

    Raises:
        ConfigError: There is no such device here.
    """
    device = choose_device(compute.device)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    if device.type == "cuda" and compute.memory_mib is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (compute.memory_mib << 20) / whole), device)
    return device


def shared(compute: ComputePolicy, processes: int) -> ComputePolicy:
    """What one of several processes may use that work on one machine at a time.

    On CUDA each gets an equal part of the memory, unless `memory_mib` is given: torch would keep whatever it has once
    had, and whoever comes last would find nothing.

    Args:
        compute: What each would use alone.
        processes: How many there are, at least 1.

    Raises:
        ConfigError: There is no such device here.
    """
    device = choose_device(compute.device)
    if device.type != "cuda" or compute.memory_mib is not None:
        return compute
    part = torch.cuda.get_device_properties(device).total_memory // processes - _CONTEXT
    return compute.model_copy(update={"memory_mib": max(64, part >> 20)})


def compute_of(compute: ComputePolicy, number: int) -> ComputePolicy:
    """What process `number` of a client, from 0, may use.

    GPU `number`; without GPUs its part of the threads and of the memory that is free now.

    Raises:
        ConfigError: There are fewer GPUs than processes, or no such device.
    """
    if compute.processes == 1:
        return compute
    device, found = choose_device(compute.device), torch.cuda.device_count()
    if device.type == "cuda":
        if found < compute.processes:
            raise ConfigError(
                f"compute.processes = {compute.processes}: torch sees {found} GPUs here, and each process takes one; "
                f'set it to {found} or less, or compute.device = "cpu"'
            )
        return compute.model_copy(update={"device": f"cuda:{number}"})
    free = free_bytes(device, None)
    room = compute.memory_mib or (None if free is None else max(64, (free >> 20) // compute.processes))
    threads = compute.threads or max(1, torch.get_num_threads() // compute.processes)
    return compute.model_copy(update={"memory_mib": room, "threads": threads})


def on_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on a device. On CUDA the copy is one that nobody waits for."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def free_bytes(device: torch.device, cap_mib: int | None) -> int | None:
    """Memory that training may still take, at most what is left of the cap; None if nobody knows.

    On the CPU it is what the machine and this process's control group have left.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device)
        # What torch holds and does not use is given out again before anything is asked of the driver.
        free = torch.cuda.mem_get_info(device)[0] + held - torch.cuda.memory_allocated(device)
        used = torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        limits = [each for each in (_available(), _left_of_group()) if each is not None]
        if not limits:
            return None if cap_mib is None else max(0, (cap_mib << 20) - _resident())
        free, used = min(limits), _resident()
    else:
        return None if cap_mib is None else cap_mib << 20
    return free if cap_mib is None else max(0, min(free, (cap_mib << 20) - used))


def kept_bytes(work: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that the forward passes of `work` keep for the backward pass, each storage once, those of `model` left out.

    What `work` returns must hold its graph, so that no storage is given out twice meanwhile.
    """
    # By what they are stored in: a layer keeps its weight as a view, which is no parameter.
    own = {_storage(each) for each in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := _storage(tensor)) not in own:
            seen[place] = tensor.untyped_storage().nbytes()
        return tensor

    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    with hooks(pack, lambda tensor: tensor):
        held = work()
    del held
    return sum(seen.values())


def _storage(tensor: torch.Tensor) -> int:
    """Which storage a tensor is in; not its address, which fake tensors have not."""
    return int(tensor.untyped_storage()._cdata)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python failed for want of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # not Linux: bytes, and the peak
    return pages * resource.getpagesize()


def _available() -> int | None:
    """MemAvailable of the machine."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_group() -> int | None:
    """What the control group of this process may still take, as a container or a systemd unit limits it."""
    try:
        path = next(line[3:] for line in _CGROUP.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = _CGROUPS / path.strip("/")
    left = []
    for group in (folder, *folder.parents):
        try:
            most, now = ((group / f"memory.{each}").read_text(encoding="ascii").strip() for each in ("max", "current"))
        except OSError:
            continue
        if most != "max":
            left.append(max(0, int(most) - int(now)))
    return min(left, default=None)
