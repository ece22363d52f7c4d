"""The machine: versions, device, disk and clock."""

import datetime as dt
import errno
import os
import platform
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedloom.client.doctor.finding import Finding, failed, ok, warning
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.ledger.file import connect
from fedloom.client.training.device import free_bytes, prepare_device
from fedloom.core.errors import FedloomError, LedgerError

__all__ = ["clock", "device", "disk", "file_system", "packages", "python", "state_folder"]

_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs"}
    | {"gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"}
)
_VOLATILE = frozenset({"ramfs", "tmpfs"})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CPU = Path("/proc/cpuinfo")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of x86 and ARM CPUs."""
_MOUNTS = Path("/proc/self/mountinfo")
_ROOM_BYTES = (256 << 20, 2 << 30)
"""Free space below which a ledger is in danger, and below which a base model or outbox may not fit."""


def python() -> Finding:
    """Whether this Python is one that the package is for."""
    mine, wanted = platform.python_version(), metadata("fedloom")["Requires-Python"]
    if not SpecifierSet(wanted).contains(mine, prereleases=True):
        return failed(
            "python", f"Python {mine}; fedloom needs {wanted}", "make the virtual environment with another Python"
        )
    return ok("python", f"Python {mine} (needs {wanted})")


def packages() -> Iterator[Finding]:
    """Each package the client needs against the range that this fedloom was tested with."""
    fine = []
    for text in requires("fedloom") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": "client"}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield failed("packages", f"{wanted.name} is not installed", "pip install 'fedloom[client]'")
            continue
        if wanted.specifier.contains(found, prereleases=True):
            fine.append(f"{wanted.name} {found}")
        else:
            yield failed(
                "packages",
                f"{wanted.name} {found} is outside the tested range {wanted.specifier}",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
    yield ok("packages", f"{len(fine)} packages within their tested ranges: {', '.join(fine)}")


def device(compute: ComputePolicy, weights_bytes: int | None = None) -> Finding:
    """Torch, the device of the policy, and whether a base model of that size leaves room on it."""
    try:
        chosen = prepare_device(compute)
    except FedloomError as error:
        return failed("device", str(error))
    free = free_bytes(chosen, compute.memory_mib)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    text = f"torch {torch.__version__} on {chosen} ({name})"
    if free is None:
        return warning("device", f"{text}; how much memory is free is not known here", "set compute.memory_mib")
    text += f", {free >> 20:,} MiB for training"
    if weights_bytes is not None and weights_bytes > free:
        return failed(
            "device",
            f"{text}; the base model alone takes {weights_bytes >> 20:,} MiB",
            'end what else uses it, raise compute.memory_mib, or set compute.dtype = "bfloat16" or '
            'compute.quantization = "4bit"',
        )
    if compute.device == "auto" and chosen.type == "cpu" and Path("/dev/nvidiactl").exists():
        return warning(
            "device", f"{text}; there is an NVIDIA device that torch does not see", "install a torch built for CUDA"
        )
    if compute.dtype == "bfloat16" and chosen.type == "cpu" and not _bfloat16(_CPU):
        return warning(
            "device",
            f"{text}; this CPU has no bfloat16 arithmetic, and imitates it slowly",
            'set compute.dtype = "float32" unless memory is short',
        )
    return ok("device", text)


def _bfloat16(about: Path) -> bool:
    """Whether the CPU computes in bfloat16 itself, by the text of /proc/cpuinfo; True where there is no such file."""
    if not about.is_file():
        return True
    return bool(_BFLOAT16 & set(about.read_text(encoding="utf-8").split()))


def state_folder(folder: Path) -> Finding:
    """Whether a ledger in this folder would survive a crash: written and synced there once, for trial."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    kind = file_system(place, _MOUNTS.read_text(encoding="utf-8") if _MOUNTS.is_file() else "")
    remedy = "set client.state to a folder on a local disk"
    if kind in _NETWORK:
        return failed("state", f"{folder} is on a network file system ({kind}), where SQLite's log is not safe", remedy)
    if kind in _VOLATILE:
        return failed("state", f"{folder} is in memory ({kind}): the ledger would be gone after a restart", remedy)
    try:
        with tempfile.TemporaryDirectory(prefix=".fedloom-doctor-", dir=place) as trial:
            db = connect(Path(trial) / "trial.ledger")
            try:
                db.execute("CREATE TABLE trial (x)")
                db.execute("INSERT INTO trial VALUES (1)")
            finally:
                db.close()
            handle = os.open(trial, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except (OSError, sqlite3.Error, LedgerError) as error:
        cause = error.__cause__ if isinstance(error, LedgerError) and error.__cause__ else error
        if getattr(cause, "errno", None) in _FULL or getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return failed("state", f"{place} has no room: {cause}", "free the disk, and start the client again")
        if isinstance(error, LedgerError):
            return failed("state", f"{folder} cannot hold a ledger: {error}", remedy)
        return failed("state", f"{place} cannot be written: {error}", "make it writable for this user, or " + remedy)
    return ok("state", f"{folder} is on {kind or 'a file system'} that syncs and keeps SQLite's log")


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that `path` is on, by the text of /proc/self/mountinfo; "" if it does not say."""
    resolved, best, found = path.resolve(), -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        # The last of equal ones covers those before it.
        if (resolved == point or point in resolved.parents) and len(point.parts) >= best:
            best, found = len(point.parts), after.split()[0]
    return found


def disk(folder: Path) -> Finding:
    """Free space where the state is kept."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    text = f"{free >> 20:,} MiB free at {place}"
    least, few = _ROOM_BYTES
    if free < least:
        return failed(
            "disk", text, f"free at least {least >> 20} MiB: a ledger that cannot be written stops the client"
        )
    if free < few:
        return warning("disk", text, f"free {few >> 20:,} MiB, which the updates and the cache may need")
    return ok("disk", text)


def clock(now: dt.datetime, known: dict[str, dt.datetime]) -> Finding:
    """Whether the clock is plausible.

    Args:
        now: What it shows.
        known: Moments that are past for certain, by what tells so.
    """
    for what, moment in known.items():
        if now < moment:
            return failed(
                "clock",
                f"the clock shows {now:%Y-%m-%d %H:%M} UTC, before {what} ({moment:%Y-%m-%d %H:%M})",
                "set the clock, and keep it right with NTP: certificates and hours depend on it",
            )
    return ok("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC, {dt.datetime.now().astimezone():%H:%M %Z} here")
