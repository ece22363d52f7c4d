"""A run as an object: the same model as a run file."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel

from fedloom.api.components import Local, adapter_table, not_installed, strategy_table, task_table
from fedloom.core import registry
from fedloom.core.config.data import DataSection
from fedloom.core.config.evaluation import EvaluationSection, FederatedEvaluationSection
from fedloom.core.config.parsing import FileName, Section, parse, put
from fedloom.core.config.run import (
    EngineSection,
    PrivacySection,
    RoundsSection,
    RunConfig,
    SecureAggregationSection,
    StrategySection,
    TrainSection,
    UserLevelSection,
    WireSection,
    load_run,
)
from fedloom.core.config.start import StartSection
from fedloom.core.config.virtual_time import VirtualTimeSection
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy

__all__ = ["Model", "Run", "load"]


class Model(Section):
    """The frozen base model that every client holds."""

    base: FileName
    """Local folder in Hugging Face format, a name from `fedloom assets` such as minilm-l6, or ORG/NAME in this
    machine's hub cache."""
    digest: str | None = None
    """Pin of the base model's files; a client whose folder differs refuses. None accepts what is found."""
    head: Literal["train", "frozen"] | None = None
    """Whether the classification head is trained (inside the clipped set) or stays at its start value. None is what
    the task does."""


class Run:
    """What a run file says, as an object. It does not change; `replace` makes another.

    A task, an adapter or a strategy of a class that is defined in this process works in it; to go into a file or over
    gRPC it must be installed.

    Args:
        model: The base model: a folder, an asset's name, or `Model`.
        task: What it is trained for, such as `TextClassification(labels=["neg", "pos"])`.
        train: Local training on each client in each round.
        adapter: Which parameters are trained, such as `LoRA(rank=8)`; None is `LoRA()`.
        privacy: Example-level differential privacy on every client; None trains without any.
        strategy: How updates become the next adapter: an object, a name, or `Strategy` with options.
        rounds: Number of federated rounds.
        name: Of the run; results go to a folder of this name.
        seed: Of everything public: starting adapter, cohort, partition. Never of private noise.
        round_rules: When a round opens and closes.
        user_level: Differential privacy of whole clients, added by the coordinator; given, it is enabled.
        secure_aggregation: Sums that hide each update from the coordinator; given, it is enabled.
        federated_evaluation: Scores on rows that clients hold out; given, it is enabled.
        evaluation: The held-out set of whoever runs the federation.
        wire: Codecs.
        engine: How a simulation runs.
        virtual_time: How long simulated clients take and when they are there; given, a simulation keeps virtual time.
        start: An earlier adapter to go on from.
        data: Data that are named in the run, for a simulation that is given none.

    Raises:
        ConfigError: A value is wrong; the message is that of a run file with the same mistake.
    """

    def __init__(
        self,
        *,
        model: str | Path | Model,
        task: Any,
        train: TrainSection,
        adapter: Any = None,
        privacy: PrivacySection | None = PrivacySection(),  # noqa: B008  # it is frozen
        strategy: "str | StrategySection | Strategy" = "fedavg",
        rounds: int = 10,
        name: str = "run",
        seed: int = 0,
        round_rules: RoundsSection | None = None,
        user_level: UserLevelSection | None = None,
        secure_aggregation: SecureAggregationSection | None = None,
        federated_evaluation: FederatedEvaluationSection | None = None,
        evaluation: EvaluationSection | None = None,
        wire: WireSection | None = None,
        engine: EngineSection | None = None,
        virtual_time: VirtualTimeSection | None = None,
        start: StartSection | None = None,
        data: DataSection | None = None,
    ) -> None:
        base = model if isinstance(model, Model) else Model(base=str(model))
        strategy_section, own = strategy_table(strategy)
        task_keys, local = task_table(task)
        adapter_keys, of_adapter = ({}, {}) if adapter is None else adapter_table(adapter)
        local |= of_adapter
        sections: dict[str, BaseModel | None] = {
            "train": train,
            "privacy": PrivacySection(enabled=False) if privacy is None else privacy,
            "rounds": round_rules,
            "user_level": user_level,
            "secure_aggregation": secure_aggregation,
            "federated_evaluation": federated_evaluation,
            "evaluation": evaluation,
            "wire": wire,
            "engine": engine,
            "virtual_time": virtual_time,
            "start": start,
            "data": data,
        }
        tables = {
            "run": {"name": name, "rounds": rounds, "seed": seed},
            "model": {**task_keys, **_written(base)},
            "adapter": adapter_keys,
            "strategy": strategy_section,
            **{key: _enabled(section) for key, section in sections.items() if section is not None},
        }
        self._set(_parsed(tables, local), own, local)

    def _set(self, config: RunConfig, own: "Strategy | None", local: Local) -> None:
        self._config, self._own, self._local = config, own, local

    @property
    def config(self) -> RunConfig:
        """The run file, checked."""
        return self._config

    @property
    def local_strategy(self) -> "Strategy | None":
        """The strategy, if it is installed nowhere; None if the run names an installed one."""
        return self._own

    @property
    def local(self) -> Local:
        """The classes of its task and its adapter that are installed nowhere, by group and name."""
        return self._local

    def not_installed(self) -> str | None:
        """What it has that is installed nowhere, and what to do about it; None if there is nothing."""
        if self._own is not None:
            return not_installed("strategies", type(self._own))
        return next((not_installed(group, kind) for (group, _), kind in self._local.items()), None)

    def replace(self, changes: Mapping[str, object]) -> "Run":
        """Another run, with some keys changed.

        Args:
            changes: Values by section.key, as in a run file: {"train.learning_rate": 4}. task, adapter and strategy
                take objects too, and every section its own.

        Raises:
            ConfigError: A key is unknown or a value wrong.
        """
        tables, own, local = _written(self._config), self._own, dict(self._local)
        for path, value in changes.items():
            if path == "strategy":
                tables["strategy"], own = strategy_table(value)  # type: ignore[arg-type]  # which checks it
            elif path == "task":
                base = {key: tables["model"][key] for key in ("base", "digest") if key in tables["model"]}
                keys, more = task_table(value)
                tables["model"], local = {**base, **keys}, local | more
            elif path == "adapter":
                tables["adapter"], more = adapter_table(value)
                local |= more
            else:
                put(tables, path, _enabled(value) if isinstance(value, BaseModel) else value)
                own = _with_option(own, path, value)
        named = ("tasks", tables["model"].get("task")), ("adapters", tables.get("adapter", {}).get("kind"))
        local = {each: kind for each, kind in local.items() if each in named}
        return _made(_parsed(tables, local), own, local)

    def to_toml(self, path: str | Path | None = None) -> str:
        """The run file, with the keys that were set; `load` reads it back to an equal run.

        Args:
            path: Where to write it too.

        Raises:
            ConfigError: Something of it is defined in this process only, or the file cannot be written.
        """
        if (why := self.not_installed()) is not None:
            raise ConfigError(f"a run file names what is installed, and {why}")
        text = tomli_w.dumps(_written(self._config))
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error}; give another path") from error
        return text

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        if not isinstance(other, Run):
            return NotImplemented
        return (self._config, self._own, self._local) == (other._config, other._own, other._local)

    __hash__ = None  # type: ignore[assignment]  # a section may hold a dict

    def __repr__(self) -> str:
        """The run file's text."""
        return f"fl.Run\n{tomli_w.dumps(_written(self._config))}"


def load(path: str | Path) -> Run:
    """The run that a file describes.

    Raises:
        ConfigError: The file is missing or wrong; the message names the key and the nearest valid one.
    """
    return _made(load_run(Path(path)), None, {})


def _parsed(tables: dict[str, Any], local: Local) -> RunConfig:
    """A run file's tables, checked with the components they name, as `load_run` does."""
    with registry.locally(local):
        config = parse(RunConfig, tables, source="fl.Run")
        try:
            config.check_components()
        except ConfigError as error:
            raise ConfigError(f"fl.Run: {error}") from error
    return config


def _made(config: RunConfig, own: "Strategy | None", local: Local) -> Run:
    run = Run.__new__(Run)
    run._set(config, own, local)
    return run


def _written(section: BaseModel) -> dict[str, Any]:
    """The keys that were set, as TOML has them."""
    return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def _enabled(section: BaseModel) -> dict[str, Any]:
    """A section that can be off is on where it is given, unless it says otherwise."""
    on = {"enabled": True} if "enabled" in type(section).model_fields else {}
    return {**on, **_written(section)}


def _with_option(own: "Strategy | None", path: str, value: object) -> "Strategy | None":
    """A local strategy after one key of the run file has changed.

    Raises:
        ConfigError: It has no such option.
    """
    if own is None or path == "strategy.name":
        return None
    if not path.startswith("strategy.options."):
        return own
    option = path.removeprefix("strategy.options.")
    if not is_dataclass(own) or option not in {field.name for field in fields(own)}:
        raise ConfigError(f"{type(own).__name__} has no field {option!r}; give a new object for 'strategy'")
    return replace(own, **{option: value})
