"""What every engine needs: the completed run file, the clients' data and policies, and the held-out set."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w

from fedloom.client.data.load import load_rows
from fedloom.client.data.partitioners.api import Partitioner, partition
from fedloom.client.data.rows import Rows, documents, picture, recording_path
from fedloom.client.data.tokens import Encoded, encode
from fedloom.client.eval.held_out import drawn, held_out
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.base_folder import base_digest, resolve_base
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy, Policy, SecureAggregationPolicy
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.core.config.data import DataSection
from fedloom.core.config.run import RunConfig, Spec
from fedloom.core.config.start import pinned
from fedloom.core.errors import ConfigError, FedloomError
from fedloom.core.privacy.spends import round_participation
from fedloom.core.registry import OURS
from fedloom.core.registry import build as build_component
from fedloom.server.build import calibrated
from fedloom.server.coordinator import Coordinator
from fedloom.server.privacy.user_ledger import check_supply
from fedloom.strategies.api import Strategy

__all__ = [
    "Federation",
    "Given",
    "build",
    "check_alive",
    "completed",
    "declared_size",
    "divided",
    "shares",
    "simulated_policy",
    "write_client",
]

_HELD_OUT = 0.1
"""Share of a simulated client's rows that federated evaluation takes."""


@dataclass(frozen=True)
class Federation:
    """A simulated federation, ready to run."""

    config: RunConfig
    model: AdapterModel
    clients: dict[str, Rows]
    """Each client's private rows, by client name."""
    policies: dict[str, Policy]
    held_out: Encoded
    """Held-out rows for evaluation, tokenized."""


@dataclass(frozen=True)
class Given:
    """Data in place of those that a run file's [data] section names."""

    clients: dict[str, Rows]
    """Each client's private rows, by client name."""
    held_out: Rows
    """What the run is scored on."""


def completed(config: RunConfig, own: Strategy | None = None) -> RunConfig:
    """The run file with what the coordinator decides filled in: noise multiplier and the base model's digest.

    Args:
        config: The run file.
        own: A strategy that is installed nowhere, in place of the one that it names.

    Raises:
        ConfigError: The privacy target cannot be reached.
        ModelError: The base model is missing.
    """
    digest = config.model.digest or base_digest(resolve_base(config.model.base))
    model = config.model.model_copy(update={"digest": digest})
    return calibrated(config, own).model_copy(update={"model": model, "start": pinned(config.start)})


def declared_size(count: int) -> int:
    """What a simulated client declares in public: its number of examples to two significant digits.

    >>> declared_size(3064), declared_size(87), declared_size(5)
    (3100, 87, 5)
    """
    return int(float(f"{count:.2g}"))


def build(config: RunConfig, folder: Path, given: Given | None = None) -> Federation:
    """Load the model and the data, split the data among the clients, and write each client's policy.

    Args:
        config: A completed run file (see `completed`).
        folder: Run folder; the clients' ledgers go below it, so that a simulation never charges a real account.
        given: Data in place of those of the run file.

    Raises:
        ConfigError: There are no data: no [data] section. More clients than rows, or too few clients for its rounds.
        DataError: The data cannot be loaded.
        ModelError: The base model cannot be loaded.
    """
    if given is None and config.data is None:
        raise ConfigError("a simulation needs a [data] section with source and clients; see examples/sentiment.toml")
    count = len(given.clients) if given else config.data.clients if config.data else 0
    if count < config.rounds.min_clients:
        raise ConfigError(
            f"{'the number of clients' if given else 'data.clients'} = {count} is below rounds.min_clients = "
            f"{config.rounds.min_clients}: no round could ever open; raise the first or lower the second"
        )
    check_supply(config, count)
    if given is None:
        assert config.data is not None  # checked above
        given = Given(shares(config, config.data), held_out(config, config.data.source))
    clients, scored = given.clients, drawn(given.held_out, config)
    compute = ComputePolicy.of(config.engine)
    policies = _agreeing({name: len(own) for name, own in clients.items()}, config, folder, compute)
    if config.secure_aggregation.enabled:
        policies = _acquainted(policies)
    model = load_model(config.model, config.adapter, compute)
    encoded = model.prepared(encode(scored, model.tokenizer, config.model.max_length))
    return Federation(config, model, clients, policies, encoded)


def shares(config: RunConfig, data: DataSection) -> dict[str, Rows]:
    """Each simulated client's rows by its name: the same on every machine, and no row in two shares.

    Args:
        config: The run file.
        data: Its [data] section.

    Raises:
        ConfigError: There are more clients than rows.
        DataError: The data cannot be loaded.
    """
    return divided(load_rows(data.source, config.model.labels, "train", config.model.task, data), config, data)


def divided(rows: Rows, config: RunConfig, data: DataSection) -> dict[str, Rows]:
    """Rows that are read already, as `shares` gives them to the clients.

    Raises:
        ConfigError: There are more clients than rows.
    """
    if data.max_examples is not None and data.max_examples < len(rows):
        rng = np.random.default_rng([config.run.seed, 1])
        rows = rows.take(np.sort(rng.permutation(len(rows))[: data.max_examples]))
    by: Partitioner = build_component("partitioners", data.partition, data.options)
    parts = partition(rows, data.clients, by, config.run.seed)
    width = len(str(len(parts) - 1))
    return {f"client-{index:0{width}d}": rows.take(part) for index, part in enumerate(parts)}


def write_client(policy: Policy, rows: Rows, folder: Path) -> Path:
    """Write a client's data file and policy file, as its owner would have them; returns the policy's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents(rows))
    for place, files in ((picture, rows.images), (recording_path, rows.audio)):
        for number, content in enumerate(files):
            path = folder / place(number)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    tables = policy.model_dump(mode="json", exclude_none=True)
    tables["client"] |= {"state": ".", "anchors": "ledger"}
    tables["data"] |= {"answers": rows.answers, **({"labels_as": "names"} if rows.label_names else {})}
    path = folder / "policy.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def check_alive(federation: Federation, coordinator: Coordinator) -> None:
    """Refuse to wait for clients that a simulation does not have.

    Raises:
        FedloomError: So many updates were refused that the open round can never close, or the strategy fails.
    """
    coordinator.check()
    progress = coordinator.progress
    refused = sorted(client for client, reason in progress.lost.items() if reason == "rejected")
    left = len(federation.clients) - len(refused)
    if left < progress.needed:
        if coordinator.fault is not None:
            raise coordinator.fault
        raise FedloomError(
            f"round {progress.round + 1} needs {progress.needed} updates and only {left} clients are left, since "
            f"what {', '.join(refused)} sent was refused, see the log; if it holds NaN or Inf, lower "
            "train.learning_rate"
        )


def _acquainted(policies: dict[str, Policy]) -> dict[str, Policy]:
    """The policies with every client's identity key pinned by all."""
    peers = {name: public_text(load_identity(policy.client.state)) for name, policy in policies.items()}
    sums = SecureAggregationPolicy(required=True, peers=peers)
    return {name: policy.model_copy(update={"secure_aggregation": sums}) for name, policy in policies.items()}


def _agreeing(counts: dict[str, int], config: RunConfig, folder: Path, compute: ComputePolicy) -> dict[str, Policy]:
    """Each client's policy.

    Sections that say the same are one object: a thousand clients do not take the memory of a thousand copies.
    """
    policies: dict[str, Policy] = {}
    for name, count in counts.items():
        policy = simulated_policy(name, count, config, folder, compute)
        first = next(iter(policies.values()), policy)
        policies[name] = policy.model_copy(update={key: same for key, same in first if same == getattr(policy, key)})
    return policies


def simulated_policy(name: str, count: int, spec: Spec, folder: Path, compute: ComputePolicy) -> Policy:
    """A policy that allows exactly what the run asks, as an agreeing site would write it."""
    held_out = _HELD_OUT if spec.federated_evaluation.enabled else 0.0
    return Policy.model_validate(
        {
            # Anchors beside the ledger: a simulation's accounts must leave no trace among this machine's own.
            "client": {
                "name": name,
                "state": str(folder / "clients" / name),
                "anchors": str(folder / "clients" / name / "ledger"),
            },
            "data": {
                "source": "train.jsonl",
                "task": spec.model.task,
                "labels": spec.model.labels,
                "declared_examples": declared_size(round((1 - held_out) * count)),
                "held_out": held_out,
            },
            "model": {"digests": [spec.model.digest] if spec.model.digest else []},
            "privacy": {
                "epsilon": spec.privacy.epsilon,
                "delta": spec.privacy.delta,
                "min_noise_multiplier": spec.privacy.noise_multiplier or 1.0,
                "max_sampling_rate": round_participation(spec)[0],
                "min_clip_norm": spec.privacy.clip_norm,
                "max_clip_norm": spec.privacy.clip_norm,
                "allow_non_private": not spec.privacy.enabled,
            },
            "limits": {
                "adapter_kinds": [spec.adapter.kind],
                "max_steps_per_round": spec.train.steps,
                "max_rounds": spec.run.rounds,
                "max_learning_rate": 1e4,  # a strategy may set another one than the run file
            },
            "compute": compute.model_dump(),
            "components": {group: [OURS, *names] for group, names in spec.components.items()},
        }
    )
