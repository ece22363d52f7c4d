"""The client's own policy file: what this site allows, whatever a coordinator asks."""

import json
import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fedloom.client.component_policy import ComponentsPolicy, component_problems
from fedloom.client.session.training_hours import check_hours
from fedloom.core.config.compute import ComputeOptions
from fedloom.core.config.file_format import Form
from fedloom.core.config.parsing import FileName, FilePath, Section, explain, parse, read_toml
from fedloom.core.config.run import Spec, task_traits
from fedloom.core.errors import PolicyError
from fedloom.core.limits import MAX_ROUNDS
from fedloom.core.privacy.spends import round_participation
from fedloom.core.registry import entries

__all__ = [
    "SLOWEST_BYTES_PER_S",
    "ClientSection",
    "ComputePolicy",
    "DataPolicy",
    "LimitsPolicy",
    "ModelPolicy",
    "Policy",
    "PrivacyPolicy",
    "SecureAggregationPolicy",
    "check_spec",
    "load_policy",
]


SLOWEST_BYTES_PER_S = 256 << 10
"""Least bandwidth a policy may give: a coordinator ends a call in which a chunk takes longer than ten seconds."""

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ClientSection(Section):
    """[client]: who this is and where it works."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name shown to the coordinator."""
    state: FilePath = Path("fedloom-state")
    """Folder of the privacy ledger; keep it as long as the data. All data of one folder is one account."""
    anchors: FilePath | None = None
    """Folder outside `state` of what the ledger is checked against; keep it as long. By default `fedloom` in
    $XDG_STATE_HOME or ~/.local/state."""

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, values: object) -> object:
        for key in ("device", "threads"):
            if isinstance(values, dict) and key in values:
                raise ValueError(f"client.{key} is compute.{key} now; move it to the section [compute]")
        return values


class DataPolicy(Form):
    """[data]: the private data set."""

    source: FileName
    """A file (.csv, .tsv, .jsonl or .parquet), a folder with such a file called train, a folder that Hugging Face's
    save_to_disk wrote, or pictures in a folder for each class. The columns of each task are in data.md."""
    task: str | None = None
    """What the rows are for, as model.task of a run: other runs are refused. Left out beside labels it is
    text-classification. A private run needs this and labels: what makes a row malformed is never a coordinator's to
    say."""
    labels: tuple[str, ...] = Field(default=(), max_length=10_000)
    """Label names, at least 2, which a run must have as model.labels, in this order. The labels in the data are these
    names, or all of them positions in this list, see labels_as. causal-lm and instruct have none."""
    declared_examples: int | None = Field(default=None, ge=1)
    """A public number of examples, independent of the exact count. A private run needs it: it divides the
    noisy sum and may weight the update. Round it, and never derive it from the data at run time."""
    held_out: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the rows that is never trained on but evaluated on, in runs that ask for it: [federated_evaluation]. A
    row's text decides its side. 0 holds none out and refuses such runs. declared_examples leaves these rows out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.task is not None and self.labels and not task_traits(self.task).labels:
            raise ValueError(f"data.labels has {len(self.labels)} names but {self.task} has none; remove them")
        if len(self.labels) == 1:
            raise ValueError("data.labels has one name; name at least 2, in the order of the run's model.labels")
        return self

    @property
    def own_task(self) -> str | None:
        """The task that the rows are read for whatever a run asks; None where this policy does not say all of it."""
        if self.labels or (self.task is not None and not task_traits(self.task).labels):
            return self.task or "text-classification"
        return None


class ModelPolicy(Section):
    """[model]: the base model as this site has it."""

    folder: FileName | None = None
    """Where the base model lies here; None takes the run's name for it."""
    digests: tuple[str, ...] = ()
    """Base models this site is willing to load; `fedloom prepare` prints a model's digest. Empty allows any that
    lies here."""


class PrivacyPolicy(Section):
    """[privacy]: bounds that no coordinator can loosen."""

    epsilon: float = Field(default=6.0, ge=1e-3, le=1e4)
    """Budget over the whole life of the data set, all runs together."""
    delta: float = Field(default=1e-5, ge=1e-15, lt=1)
    """Delta of that budget; well below one over the number of examples."""
    min_noise_multiplier: float = Field(default=0.3, ge=0.01, le=1000)
    """Least noise accepted in any step."""
    max_sampling_rate: float = Field(default=0.5, ge=1e-9, le=1)
    """Highest Poisson rate accepted; with noise bands, that of the steps in which an example may be."""
    min_clip_norm: float = Field(default=1e-3, ge=1e-6, le=1e6)
    """Least clip norm accepted."""
    max_clip_norm: float = Field(default=1e3, ge=1e-6, le=1e6)
    """Largest clip norm accepted."""
    allow_non_private: bool = False
    """Whether a run without differential privacy may train on this data."""


class ComputePolicy(ComputeOptions):
    """[compute]: what of this machine training may use, and when."""

    upload_bytes_per_s: int | None = Field(default=None, ge=SLOWEST_BYTES_PER_S)
    """Most bytes of updates sent in a second, on average. None sets no cap. A coordinator ends slower transfers."""
    download_bytes_per_s: int | None = Field(default=None, ge=SLOWEST_BYTES_PER_S)
    """Most bytes of adapters received in a second, on average. None sets no cap."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes that share out the examples of each step, one for each GPU, or on a CPU with its part of the threads.
    Each holds the base model and the rows. With more than 1 device is auto, cpu or cuda, and process n takes GPU n."""
    hours: str | None = None
    """HH:MM-HH:MM, this machine's time of day: outside it the client leaves the run and waits. A round that has begun
    is finished, and sent. None is always."""

    @classmethod
    def of(cls, options: ComputeOptions) -> Self:
        """The policy that has these options and no others."""
        return cls.model_validate(options.model_dump(include=set(ComputeOptions.model_fields)))

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        if self.processes > 1 and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"processes = {self.processes} with device = {self.device!r}; take auto, cpu or cuda, and set "
                "CUDA_VISIBLE_DEVICES to choose GPUs"
            )
        return self

    @field_validator("hours")
    @classmethod
    def _readable(cls, hours: str | None) -> str | None:
        return None if hours is None else check_hours(hours)


class LimitsPolicy(Section):
    """[limits]: caps on work."""

    adapter_kinds: tuple[str, ...] | None = None
    """Adapter kinds accepted, of those that [components] allows. None accepts them all."""
    max_steps_per_round: int = Field(default=1000, ge=1)
    """Most optimiser steps in one round."""
    max_rounds: int = Field(default=10_000, ge=1, le=MAX_ROUNDS)
    """Longest run accepted; no round beyond it is trained, whatever the run says later."""
    max_learning_rate: float = Field(default=1000.0, ge=1e-9, le=1e4)
    """Highest learning rate accepted, of the adapter and of the head, in the run and in any of its rounds."""
    max_weight: float = Field(default=100.0, ge=1.0, le=1e6)
    """Largest absolute value accepted in an adapter from the coordinator, in a term for its gradients, and in what its
    low-rank pairs and corrections add to a frozen weight. Trained values are rarely beyond 10. A round with a larger
    one is refused before it is charged."""


class SecureAggregationPolicy(Section):
    """[secure_aggregation]: whom this site shares a sum with."""

    required: bool = False
    """Whether a run without secure aggregation is refused."""
    min_clients: int = Field(default=3, ge=3)
    """Least number of clients in a sum that this site's update may be part of. In a sum of two each knows the
    other's."""
    peers: dict[str, PublicKey] = Field(default_factory=dict)
    """Public identity key of each peer by its name, as its `fedloom identity` prints it. Have it from the peer itself:
    a key that came through the coordinator protects from nobody."""

    @field_validator("peers")
    @classmethod
    def _distinct(cls, peers: dict[str, str]) -> dict[str, str]:
        if len(set(peers.values())) < len(peers):
            raise ValueError("two peers have the same key; each site has an identity of its own")
        return peers


class Policy(Section):
    """A whole policy file."""

    client: ClientSection
    data: DataPolicy
    model: ModelPolicy = ModelPolicy()
    privacy: PrivacyPolicy = PrivacyPolicy()
    limits: LimitsPolicy = LimitsPolicy()
    compute: ComputePolicy = ComputePolicy()
    secure_aggregation: SecureAggregationPolicy = SecureAggregationPolicy()
    components: ComponentsPolicy = ComponentsPolicy()

    @model_validator(mode="after")
    def _source_allowed(self) -> Self:
        # A package could otherwise put its data source before a folder of the same name.
        if self.data.source in entries("data"):
            problems = component_problems(self.components, {"data": [self.data.source]})
            if problems:
                raise ValueError(f"data.source is {problems[0]}, or write ./{self.data.source} for a file or folder")
        return self


def load_policy(path: Path, overrides: tuple[str, ...] = ()) -> Policy:
    """Read a policy file; relative paths in it count from its folder.

    Raises:
        ConfigError: The file or an override is wrong.
    """
    policy = parse(Policy, read_toml(path), overrides, source=str(path))
    home = path.resolve().parent
    anchors = policy.client.anchors and home / policy.client.anchors
    client = policy.client.model_copy(update={"state": home / policy.client.state, "anchors": anchors})
    source = home / policy.data.source
    data = policy.data.model_copy(update={"source": str(source)}) if os.path.exists(source) else policy.data
    return policy.model_copy(update={"client": client, "data": data})


def check_spec(policy: Policy, spec: Spec) -> None:
    """Refuse a run this site does not allow.

    Raises:
        PolicyError: Lists every rule that the run breaks, with what was asked and what is allowed.
        ConfigError: A component that is allowed refuses its options.
    """
    problems = _range_problems(spec) + _data_problems(policy, spec)
    problems += _privacy_problems(policy, spec) + _sum_problems(policy, spec)
    if spec.federated_evaluation.enabled and not policy.data.held_out:
        problems.append("evaluation by its clients (data.held_out = 0; set it, such as to 0.1, to take part in that)")
    if spec.train.steps > policy.limits.max_steps_per_round:
        problems.append(f"{spec.train.steps} steps a round (at most {policy.limits.max_steps_per_round})")
    if spec.run.rounds > policy.limits.max_rounds:
        problems.append(f"{spec.run.rounds} rounds (at most {policy.limits.max_rounds})")
    rate = max(spec.train.learning_rate, spec.train.head_learning_rate or 0.0)
    if rate > policy.limits.max_learning_rate:
        problems.append(f"learning rate {rate:g} (at most {policy.limits.max_learning_rate:g})")
    kinds = policy.limits.adapter_kinds
    if kinds is not None and spec.adapter.kind not in kinds:
        problems.append(f"adapter kind {spec.adapter.kind} (allowed: {', '.join(kinds)})")
    problems += component_problems(policy.components, spec.components)
    if problems:
        raise PolicyError(f"this site's policy refuses run {spec.run.name!r}: " + "; ".join(problems))
    spec.check_components()


def _range_problems(spec: Spec) -> list[str]:
    """What no run file may say; a spec that was not read from a message may never have been checked for it."""
    try:
        Spec.model_validate(spec.model_dump())
    except ValidationError as error:
        return [explain(error, Spec)]
    return []


def _data_problems(policy: Policy, spec: Spec) -> list[str]:
    """Compares two public things, so that the answer says nothing of the rows."""
    mine, asked = policy.data, spec.model
    if mine.own_task is None and not spec.privacy.enabled:
        return []
    if mine.own_task is None:
        keys = f"task = {json.dumps(asked.task)}"
        keys += f" and labels = {json.dumps(list(asked.labels), ensure_ascii=False)}" if asked.labels else ""
        return [f"a private run without data.task and data.labels in this policy; add {keys} to [data] if they are so"]
    problems = []
    if asked.task != mine.own_task:
        problems.append(f"task {asked.task} (data.task = {mine.own_task})")
    if asked.labels != mine.labels:
        problems.append(
            f"model.labels {list(asked.labels)} (data.labels = {list(mine.labels)}; name and order must be the same)"
        )
    return problems


def _privacy_problems(policy: Policy, spec: Spec) -> list[str]:
    asked, mine = spec.privacy, policy.privacy
    if not asked.enabled:
        return [] if mine.allow_non_private else ["training without privacy (privacy.allow_non_private = false)"]
    problems: list[str] = []
    if asked.noise_multiplier is None:
        problems.append("a private run without a noise multiplier")
    elif asked.noise_multiplier < mine.min_noise_multiplier:
        problems.append(f"noise multiplier {asked.noise_multiplier:g} (at least {mine.min_noise_multiplier:g})")
    scored = spec.federated_evaluation
    if scored.enabled and scored.noise_multiplier < mine.min_noise_multiplier:
        problems.append(
            f"noise multiplier {scored.noise_multiplier:g} in evaluations (at least {mine.min_noise_multiplier:g})"
        )
    if not mine.min_clip_norm <= asked.clip_norm <= mine.max_clip_norm:
        problems.append(f"clip norm {asked.clip_norm:g} ({mine.min_clip_norm:g} to {mine.max_clip_norm:g})")
    if (rate := round_participation(spec)[0]) > mine.max_sampling_rate:
        bands = f" over {asked.noise_bands} noise bands" if asked.noise_bands > 1 else ""
        problems.append(f"sampling rate {rate:g}{bands} (at most {mine.max_sampling_rate:g})")
    if policy.data.declared_examples is None:
        problems.append("a private run without data.declared_examples in this policy; declare a rounded number")
    else:
        # A mechanism that publishes each example with probability delta has this delta: at 1/n it gives one away.
        limit = 1 / policy.data.declared_examples
        deltas = (("delta", asked.delta), ("this policy's privacy.delta", mine.delta))
        problems += [
            f"{name} {delta:g} (below 1/declared_examples = {limit:g})" for name, delta in deltas if delta >= limit
        ]
    return problems


def _sum_problems(policy: Policy, spec: Spec) -> list[str]:
    asked, mine = spec.secure_aggregation, policy.secure_aggregation
    if not asked.enabled:
        return ["updates sent openly (secure_aggregation.required = true)"] if mine.required else []
    known = len(mine.peers.keys() - {policy.client.name})
    if known + 1 < mine.min_clients:
        return [f"a secure sum of at least {mine.min_clients} with {known} peers in secure_aggregation.peers"]
    return []
