"""A simulated client in a container of its own, where all containers are started alike.

The coordinator's side offers seats: names, each with a join token. A container takes a seat by locking the seat's
folder for as long as it runs, so no two ever have one name, one partition or one ledger. Key, data, ledger and spool
lie in that folder: whoever has the seat is that client, be it the same container, started again, or one that was
made anew.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from fedloom.client.config import Policy
from fedloom.proto.accounting import Spend, statement
from fedloom.proto.durable import make_folder, write_durably
from fedloom.proto.errors import ConfigError
from fedloom.proto.run import RunConfig
from fedloom.simulation.federation import completed, shares, simulated_policy
from fedloom.simulation.processes import write_client

__all__ = ["SPARE_ROUNDS", "furnish", "take_seat"]

SPARE_ROUNDS = 3
"""Rounds that a client can pay for beyond the run's. One that is killed while it trains pays for that round twice."""

_LOCK, _HOLDER = "lock", "holder"


def take_seat(folder: Path, names: Sequence[str], holder: str) -> str | None:
    """Lock one of the seats for the life of this process and of those it becomes by `exec`.

    A container comes back to the seat it had; otherwise it gets one that nobody has had, and only then one that
    another has left.

    Args:
        folder: Where the seats' folders lie, on a file system of this machine.
        names: The seats.
        holder: Who asks: the container's own name, which it keeps when it is started again.

    Returns:
        The seat's name; None when all are taken.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def order(name: str) -> int:
        path = folder / name / _HOLDER
        had = path.read_text(encoding="utf-8") if path.exists() else ""
        return 0 if had == holder else 2 if had else 1

    try:
        for name in sorted(names, key=order):
            make_folder(folder / name)
            handle = os.open(folder / name / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            os.set_inheritable(handle, True)
            write_durably(folder / name / _HOLDER, holder.encode())
            return name
    except OSError as error:
        raise ConfigError(f"cannot take a seat in {folder}: {error}; let this user write there") from error
    return None


def furnish(config: RunConfig, name: str, folder: Path, device: str = "cpu") -> Path:
    """Write a seat's data and policy, as `fedloom simulate` gives them to the client of this name.

    Args:
        config: The run file, with the number of clients in data.clients.
        name: The client's name.
        folder: The seat's folder.
        device: Torch device.

    Returns:
        Path of the policy file.

    Raises:
        ConfigError: The run has no [data] section or no client of this name.
        DataError: The data cannot be loaded.
        ModelError: The base model is missing.
    """
    if config.data is None:
        raise ConfigError("a simulated client needs a [data] section with source and clients in the run file")
    clients = config.data.clients
    shared = shares(config, config.data)
    if name not in shared:
        raise ConfigError(f"no client {name!r} among {clients}; they are {', '.join(list(shared)[:3])} ...")
    config = completed(config)
    policy = simulated_policy(name, len(shared[name]), config, folder)
    threads = config.engine.threads or max(1, (os.cpu_count() or 1) // clients)
    client = policy.client.model_copy(update={"device": device, "threads": threads})
    return write_client(_with_spare(policy.model_copy(update={"client": client}), config), shared[name], folder)


def _with_spare(policy: Policy, config: RunConfig) -> Policy:
    """The policy with a budget that pays for a few rounds more than the run has."""
    noise = config.privacy.noise_multiplier
    if not config.privacy.enabled or noise is None:
        return policy
    each = Spend(config.train.sampling_rate, noise, config.train.steps)
    budget = statement([each] * (config.run.rounds + SPARE_ROUNDS), config.privacy.delta).epsilon
    privacy = policy.privacy.model_copy(update={"epsilon": max(policy.privacy.epsilon, budget)})
    return policy.model_copy(update={"privacy": privacy})
