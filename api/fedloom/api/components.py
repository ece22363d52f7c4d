"""Tasks, adapters and strategies as objects, and the tables of a run file that they are written as."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from fedloom.client.tasks.api import Task
from fedloom.core import registry
from fedloom.core.config.parsing import Section
from fedloom.core.config.run import StrategySection
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy

__all__ = ["Local", "adapter_table", "not_installed", "strategy_table", "task_table"]

Local = dict[tuple[str, str], type]
"""Classes that are installed nowhere, by group and name, see `registry.locally`."""


def task_table(task: Any) -> tuple[dict[str, Any], Local]:
    """The keys of [model] that a task sets, and its class if it is installed nowhere.

    Raises:
        ConfigError: It is no task.
    """
    name, local = _named("tasks", task, "fl.TextClassification(labels=[...])", Task)
    table = {"task": name, **_options(task)}
    return {"head": "frozen", **table} if task.traits.generates or task.traits.headless else table, local


def adapter_table(adapter: Any) -> tuple[dict[str, Any], Local]:
    """[adapter], from an adapter, and its class if it is installed nowhere.

    Raises:
        ConfigError: It is no adapter.
    """
    name, local = _named("adapters", adapter, "fl.LoRA(rank=8)", Section)
    return {"kind": name, **_options(adapter)}, local


def not_installed(group: str, kind: type) -> str:
    """What to do about a class that only this process has."""
    return (
        f"{kind.__name__} is defined in this process only; install it at both ends, in a package that registers it "
        f"under the entry-point group fedloom.{group}, see `fedloom components new {group} NAME`"
    )


def strategy_table(strategy: "str | StrategySection | Strategy") -> tuple[dict[str, Any], "Strategy | None"]:
    """[strategy], from a name, a section or an object; and the object itself if it is installed nowhere.

    Raises:
        ConfigError: It is no strategy, or an installed one whose options cannot be read off it.
    """
    if isinstance(strategy, str):
        return {"name": strategy}, None
    if isinstance(strategy, StrategySection):
        return strategy.model_dump(mode="json", exclude_unset=True, exclude_none=True), None
    kind = type(strategy)
    missing = [name for name in ("init", "plan", "fold", "commit") if not callable(getattr(strategy, name, None))]
    missing += [] if hasattr(strategy, "traits") else ["traits"]
    if missing or isinstance(strategy, type):
        given = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {kind.__name__}"
        lacks = "" if isinstance(strategy, type) else f", which lacks {', '.join(missing)}"
        raise ConfigError(
            f"strategy is {given}{lacks}; give an object of a subclass of "
            "fedloom.strategies.api.Strategy, such as fl.FedSVD(period=2), or the name of an installed one"
        )
    installed = registry.name_of("strategies", strategy)
    if installed is None:
        options = {name: value for name, value in _changed(strategy) if _plain(value)}
        return {"name": kind.__name__, "options": options}, strategy
    if not is_dataclass(strategy):
        raise ConfigError(
            f"the options of {kind.__name__} cannot be read off the object, which is no dataclass; give "
            f'fl.Strategy(name="{installed}", options={{...}})'
        )
    options = dict(_changed(strategy))
    if strange := [name for name, value in options.items() if not _plain(value)]:
        raise ConfigError(
            f"the option {strange[0]} of {kind.__name__} is {options[strange[0]]!r}; give a truth value, a number, a "
            "text or a table of them"
        )
    return {"name": installed, "options": options}, None


def _changed(strategy: object) -> Iterator[tuple[str, Any]]:
    """Options that differ from their defaults, but for what the run file sets by model.head."""
    for field in fields(strategy) if is_dataclass(strategy) else ():
        value = getattr(strategy, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        unchanged = value is default or (_plain(value) and value == default)
        if field.init and field.name != "train_head" and not unchanged:
            yield field.name, dict(value) if isinstance(value, Mapping) else value


def _plain(value: object) -> bool:
    """Whether a run file can hold an option."""
    each = [*value, *value.values()] if isinstance(value, Mapping) else [value]
    return all(isinstance(one, bool | int | float | str) for one in each)


def _named(group: str, component: Any, example: str, base: type[Section]) -> tuple[str, Local]:
    """The name under which a component's class is installed, or that of the class and the class itself.

    Raises:
        ConfigError: It is no object of a class that fits.
    """
    noun, kind = registry.noun(group), type(component)
    if (found := registry.name_of(group, component)) is not None:
        return found, {}
    lacking = registry.lacking(group, component)
    if isinstance(component, base) and not lacking:
        return kind.__name__, {(group, kind.__name__): kind}
    if isinstance(component, Section):
        why = f"it lacks {', '.join(lacking)}" if lacking else f"it is no subclass of {base.__name__}"
        raise ConfigError(f"{kind.__name__} is no {noun}: {why}; see `fedloom components new {group} NAME`")
    shown = f"the class {component.__name__}" if isinstance(component, type) else repr(component)
    raise ConfigError(f"{noun} is {shown}; give an object such as {example}")


def _options(component: BaseModel) -> dict[str, Any]:
    """The options that were set."""
    return component.model_dump(mode="json", exclude_unset=True, exclude_none=True)
