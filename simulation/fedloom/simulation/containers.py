"""What a simulated client needs in a container of its own: its share of the data, and its policy."""

import os
from pathlib import Path

from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.training.device import shared
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import epsilon
from fedloom.core.privacy.spends import run_spends
from fedloom.simulation.federation import completed, shares, simulated_policy, write_client

__all__ = ["SPARE_ROUNDS", "furnish"]

SPARE_ROUNDS = 3
"""Rounds that a client can pay for beyond the run's. One that is killed while it trains pays for that round twice."""


def furnish(config: RunConfig, name: str, folder: Path, device: str = "auto") -> Path:
    """Write a slot's data and policy, as `fedloom simulate` gives them to the client of this name.

    Args:
        config: The run file, with the number of clients in data.clients.
        name: The client's name.
        folder: The slot's folder.
        device: As compute.device of a policy; containers that share a GPU get equal parts of its memory.

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
    parts = shares(config, config.data)
    if name not in parts:
        raise ConfigError(f"no client {name!r} among {clients}; they are {', '.join(list(parts)[:3])} ...")
    config = completed(config)
    threads = config.engine.threads or max(1, (os.cpu_count() or 1) // clients)
    alone = ComputePolicy.of(config.engine).model_copy(update={"device": device, "threads": threads})
    policy = simulated_policy(name, len(parts[name]), config, folder, shared(alone, clients))
    return write_client(_with_spare(policy, config), parts[name], folder)


def _with_spare(policy: Policy, config: RunConfig) -> Policy:
    """The policy with a budget that pays for a few rounds more than the run has."""
    if not config.privacy.enabled:
        return policy
    longer = config.run.model_copy(update={"rounds": config.run.rounds + SPARE_ROUNDS})
    spends = run_spends(config.model_copy(update={"run": longer}), longer.rounds)
    budget = epsilon(spends, config.privacy.delta)  # as the ledger counts
    privacy = policy.privacy.model_copy(update={"epsilon": max(policy.privacy.epsilon, budget)})
    return policy.model_copy(update={"privacy": privacy})
