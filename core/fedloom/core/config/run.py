"""The run file: one TOML that simulate, server and every engine read; its `spec` part is what clients see."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from fedloom.core.codecs.auto import AUTO, possible
from fedloom.core.config.compute import ComputeOptions
from fedloom.core.config.data import DataSection
from fedloom.core.config.evaluation import EvaluationSection, FederatedEvaluationSection
from fedloom.core.config.model import ModelSection, task_traits
from fedloom.core.config.parsing import OpenSection, Section, explain, parse, read_toml
from fedloom.core.config.secure_aggregation import SecureAggregationSection
from fedloom.core.config.start import StartSection
from fedloom.core.config.train import TrainSection
from fedloom.core.config.virtual_time import VirtualTimeSection
from fedloom.core.errors import ConfigError
from fedloom.core.limits import MAX_CLIENTS, MAX_RANK, MAX_ROUNDS, MAX_SPEC_BYTES
from fedloom.core.privacy.banded import MAX_BANDS, check_bands

__all__ = [
    "AdapterSection",
    "EngineSection",
    "ModelSection",
    "PrivacySection",
    "RoundsSection",
    "RunConfig",
    "RunSection",
    "SecureAggregationSection",
    "Spec",
    "StrategySection",
    "TrainSection",
    "UserLevelSection",
    "WireSection",
    "load_run",
    "task_traits",
]


class RunSection(Section):
    """[run]: identity and length."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run; results go to runs/NAME."""
    rounds: int = Field(ge=1, le=MAX_ROUNDS)
    """Number of federated rounds."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything public: starting adapter, cohort, partition. Never of private noise."""


class AdapterSection(OpenSection):
    """[adapter]: which parameters are trained. Other keys are options of the kind."""

    component: ClassVar[tuple[str, str]] = ("adapters", "kind")
    kind: str = "lora"
    """Name of an installed adapter kind; see `fedloom components list adapters`."""
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """LoRA rank r."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """LoRA alpha; the scale is alpha / rank, but for options of a kind that say otherwise."""
    targets: tuple[str, ...] | Literal["auto", "all-linear"] = "auto"
    """Names of the linear layers that get a pair, such as q_proj, or parts of full names, as decoder.fc2; "auto" for
    those of PEFT for the base model, or else its queries and values; "all-linear" for all but head, output, routers."""


class PrivacySection(Section):
    """[privacy]: example-level differential privacy on every client."""

    enabled: bool = True
    """False trains without any privacy; the client's policy must allow it."""
    epsilon: float = Field(default=6.0, ge=1e-3, le=1e4)
    """Total epsilon of one client that takes part in every round."""
    delta: float = Field(default=1e-5, ge=1e-15, lt=1)
    """Delta of that guarantee."""
    clip_norm: float = Field(default=1.0, ge=1e-6, le=1e6)
    """L2 bound C on one example's gradient over all tensors together that move in a step."""
    clipping: Literal["threshold", "automatic"] = "threshold"
    """threshold: a gradient longer than C is cut to C. automatic: each gradient g counts as C g / (|g| + 0.01), so that
    C scales steps and noise alike and needs no search."""
    noise_multiplier: float | None = Field(default=None, ge=0.01, le=1000)
    """Noise standard deviation over C. None calibrates it from epsilon, rate and steps of the whole run."""
    noise_bands: int = Field(default=1, ge=1, le=MAX_BANDS)
    """Steps that share noise, so that it partly cancels within a round; each example is then sampled in one of so many
    steps, at so many times the rate. 1: fresh noise in each step. When it pays is in optimizers.md."""

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in [model]: builds that do not know these keys are told of none, and refuse those that there are."""
        found: dict[str, Any] = plain(self)
        for name, usual in (("noise_bands", 1), ("clipping", "threshold")):
            if found.get(name) == usual:
                del found[name]
        return found


class UserLevelSection(Section):
    """[user_level]: differential privacy of whole clients, added by the coordinator, which they must trust."""

    enabled: bool = False
    """Bound every client's update and add noise to the sum of each round, beside what [privacy] does."""
    epsilon: float = Field(default=8.0, ge=1e-3, le=1e4)
    """Total epsilon of one client over the whole run; a run that would cost more is refused."""
    delta: float = Field(default=1e-6, ge=1e-15, lt=1)
    """Delta of that guarantee; below 1 / cohort, and better far below 1 over all who could take part."""
    clip_norm: float = Field(default=1.0, ge=1e-6, le=1e6)
    """L2 bound S on one client's update over all trained tensors together; its start with target_quantile."""
    noise_multiplier: float | None = Field(default=None, ge=0.01, le=1000)
    """Noise standard deviation over S. None calibrates it from epsilon and delta for the whole run."""
    mechanism: Literal["gaussian", "tree"] = "gaussian"
    """gaussian: fresh noise every round. tree: noise that cancels over rounds; needs a small max_participations."""
    cohort: int | None = Field(default=None, ge=1, le=1_000_000)
    """Number m the sum of a round is divided by, however many updates come. None is rounds.clients_per_round."""
    max_participations: int | None = Field(default=None, ge=1, le=1000)
    """Rounds that may use one client's updates; after them it is no longer asked. None charges every round."""
    target_quantile: float | None = Field(default=None, ge=0.001, le=0.999)
    """Share of updates that S should leave as they are: S follows it. None keeps S."""
    clip_rate: float = Field(default=0.2, ge=1e-6, le=10)
    """With target_quantile, the learning rate of the logarithm of S."""


class StrategySection(Section):
    """[strategy]: how updates become the next adapter."""

    name: str = "fedavg"
    """Name of a registered strategy; see `fedloom components list strategies`."""
    weighting: Literal["auto", "uniform", "examples"] = "auto"
    """uniform: all clients count the same. examples: by what each declares. auto: examples in a private run, where a
    small site has the most noise; uniform in others, in secure sums, and where the strategy takes no weights."""
    norm_bound: float | None = Field(default=None, ge=1e-6, le=1e30)
    """Longest change of one client over all trained tensors together; a longer one is scaled down. None bounds none."""
    options: dict[str, bool | int | float | str | dict[str, bool | int | float | str]] = Field(default_factory=dict)
    """Keyword arguments of the strategy: values, and tables of values."""


class RoundsSection(Section):
    """[rounds]: when a round opens and closes."""

    min_clients: int = Field(default=2, ge=1, le=MAX_CLIENTS)
    """Clients that must have joined before a round opens, and updates a round needs to be committed."""
    clients_per_round: int | None = Field(default=None, ge=1, le=MAX_CLIENTS)
    """Updates wanted in a round, which closes as soon as it has them; so many clients are drawn by the run's seed.
    None takes every joined client."""
    dropout_rate: float = Field(default=0.0, ge=0, le=0.9)
    """Share of the clients asked that will not answer. So many more are asked that clients_per_round answers come with
    completion_probability: 24 for 10 at a rate of 0.3."""
    completion_probability: float = Field(default=0.999, gt=0, lt=1)
    """Probability with which enough of them answer, if they fail independently."""
    deadline_s: float = Field(default=600.0, gt=0, le=1e8)
    """Seconds after which a round closes with the updates it has, if they are at least min_clients. A client that still
    trains for it stops."""
    lease_s: float = Field(default=30.0, gt=0, le=1e8)
    """Seconds without a sign of life after which a client counts as gone."""
    expected: tuple[str, ...] = Field(default=(), max_length=MAX_CLIENTS)
    """Names of clients without which the first round does not open; the coordinator says who of them is missing."""
    give_up_s: float = Field(default=86_400.0, gt=0, le=1e8)
    """Seconds that a run may wait in vain for the clients of its next round, once a round is committed. It then ends
    with what is committed."""
    max_update_norm: float | None = Field(default=None, ge=1e-9, le=1e30)
    """L2 norm over all tensors beyond which one client's update is refused. None takes ten times what the run's
    learning rate, steps, clip norm and noise can come to. Secure sums have secure_aggregation.max_change instead."""
    spare_rounds: int = Field(default=0, ge=0, le=MAX_ROUNDS)
    """Rounds beyond run.rounds that the noise is calibrated for: a client that is killed in a round pays for it twice,
    and takes part to the end if one is spare. No effect beside a noise_multiplier."""
    mode: Literal["synchronous", "buffered"] = "synchronous"
    """buffered (FedBuff): clients work at their own pace, and every clients_per_round updates make a round, those made
    for s rounds earlier counting 1/sqrt(1 + s). For linear strategies that keep their coordinates."""
    max_staleness: int = Field(default=4, ge=0, le=50)
    """buffered: rounds that may have passed since an update's start; an older one is refused."""
    concurrency: int | None = Field(default=None, ge=1, le=MAX_CLIENTS)
    """buffered: clients at work at a time. None asks every client that asks for work."""
    keep: int = Field(default=0, ge=0, le=MAX_ROUNDS)
    """Committed rounds, the newest, whose updates and adapters stay in the state directory: for `fedloom inspect`, and
    for RUN@ROUND in `fedloom merge`. Updates of a run without privacy have no noise."""


class WireSection(Section):
    """[wire]: codecs."""

    upload: str = AUTO
    """Codec of updates. auto: fp32 for adapters of up to 1 MiB, eden4 for larger ones."""
    broadcast: str = AUTO
    """Codec of the global adapter, or of its changes where all clients hold the same. auto: as for updates where they
    do, fp32 where they do not."""


class EngineSection(ComputeOptions):
    """[engine]: how a simulation runs, and where a coordinator scores its adapters. Clients are told nothing of it."""

    kind: Literal["inprocess", "grpc", "ray"] = "inprocess"
    """inprocess: one process, one base model. grpc: a coordinator and one process per client. ray: actors of Ray, one
    for each GPU or share of the CPUs, that serve any number of clients; needs the extra fedloom[ray]."""
    threads: int = Field(default=0, ge=0)
    """Torch threads in each process; 0 shares the machine's cores out. ray: CPUs of an actor; 0 takes one, and beside
    GPUs an equal share."""
    workers: int = Field(default=0, ge=0)
    """inprocess: clients that train at once, each in a thread with an equal share of the torch threads; the frozen
    weights are there once for all. 0 takes one for each core on the CPU, and one on a GPU."""
    one_pass: bool = False
    """inprocess: the micro-batches of all clients at once go through the model in one pass, each with its own adapter;
    train.microbatch bounds the pass. 0 workers then takes up to 32 clients. For GPUs; not for DoRA, buffered
    rounds and bases of few bits."""
    address: str = Field(default="", pattern=r"^(auto|[A-Za-z0-9.\[\]:_-]+:[0-9]+)?$")
    """ray: HOST:PORT of a running cluster of which this machine is a node, or auto for the one that runs here. Empty
    starts Ray on this machine's loopback for this run. Its machines must be one owner's."""

    @model_validator(mode="after")
    def _check(self) -> "EngineSection":
        if self.one_pass and self.kind != "inprocess":
            raise ValueError(
                f'engine.one_pass = true with engine.kind = "{self.kind}": clients share a pass in one process only; '
                'set engine.kind = "inprocess" or leave engine.one_pass out'
            )
        return self


class Spec(Section):
    """The part of a run that clients receive and check against their own policy."""

    run: RunSection
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    train: TrainSection
    privacy: PrivacySection = PrivacySection()
    wire: WireSection = WireSection()
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()
    federated_evaluation: FederatedEvaluationSection = FederatedEvaluationSection()

    @model_validator(mode="after")
    def _check(self) -> "Spec":
        if self.train.warmup >= self.run.rounds:
            raise ValueError(
                f"train.warmup = {self.train.warmup} leaves no round at the whole learning rate; set it below "
                f"run.rounds = {self.run.rounds}"
            )
        if self.train.schedule == "one-cycle" and not self.train.warmup:
            raise ValueError(
                'train.schedule = "one-cycle" rises before it falls; set train.warmup to the rounds that it rises for'
            )
        check_bands(self.privacy.noise_bands, self.train.sampling_rate, self.train.steps, private=self.privacy.enabled)
        if self.secure_aggregation.enabled and self.wire.upload != WireSection().upload:
            raise ValueError(
                f'wire.upload = "{self.wire.upload}" with secure_aggregation.enabled = true, whose updates are sent as '
                "32-bit integers; leave wire.upload out"
            )
        if self.secure_aggregation.enabled and self.federated_evaluation.enabled:
            raise ValueError(
                "federated_evaluation.enabled = true would show the coordinator each client's figures, which "
                "secure_aggregation.enabled = true promises to hide; choose one of them"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in [model]: builds that know no such section are told and have stored none."""
        found: dict[str, Any] = plain(self)
        if self.federated_evaluation == FederatedEvaluationSection():
            found.pop("federated_evaluation", None)
        return found

    @property
    def components(self) -> dict[str, tuple[str, ...]]:
        """Names, by group, of the components that a client works with."""
        return {
            "tasks": (self.model.task,),
            "adapters": (self.adapter.kind,),
            "optimizers": (self.train.optimizer,),
            "codecs": (*possible(self.wire.upload), *possible(self.wire.broadcast)),
        }

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """Read a spec sent by a coordinator: typed scalars only, strangers refused.

        Raises:
            ConfigError: It is too large or not a spec.
        """
        if len(text) > MAX_SPEC_BYTES:
            raise ConfigError(f"run spec of {len(text)} characters; at most {MAX_SPEC_BYTES} are allowed")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"the coordinator's run spec is not valid: {explain(error, cls)}") from error

    def check_components(self) -> None:
        """Refuse options that components do not have.

        This may import what another package brings. A client asks for it once its policy has allowed the names.

        Raises:
            ConfigError: Names the key.
        """
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), OpenSection):
                section.check(name)


class RunConfig(Spec):
    """A whole run file."""

    strategy: StrategySection = StrategySection()
    user_level: UserLevelSection = UserLevelSection()
    rounds: RoundsSection = RoundsSection()
    start: StartSection | None = None
    data: DataSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    engine: EngineSection = EngineSection()
    virtual_time: VirtualTimeSection | None = None

    @model_validator(mode="after")
    def _check_generate(self) -> "RunConfig":
        if self.evaluation.generate and not task_traits(self.model.task).writes:
            raise ValueError(
                f"evaluation.generate = {self.evaluation.generate} has the model write texts, and in "
                f"{self.model.task} it writes none; remove it, or choose a task such as instruct or speech-recognition"
            )
        return self

    @property
    def spec(self) -> Spec:
        """What clients get to see."""
        return Spec(**{name: getattr(self, name) for name in Spec.model_fields})


def load_run(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """A run file with `section.key=value` overrides applied.

    Raises:
        ConfigError: The file or an override is wrong; the message names the key and the nearest valid one.
    """
    config = parse(RunConfig, read_toml(path), overrides, source=str(path))
    try:
        config.check_components()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
