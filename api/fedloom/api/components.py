"""Tasks, adapters and strategies as objects, and the tables of a run file that they are written as."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from fedloom.core import registry
from fedloom.core.config.parsing import Section
from fedloom.core.config.run import StrategySection
from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy

__all__ = ["adapter_table", "strategy_table", "task_table"]


def task_table(task: Any) -> dict[str, Any]:
    """The keys of [model] that a task sets.

    Raises:
        ConfigError: It is no installed task.
    """
    table = {"task": _name("tasks", task, "fl.TextClassification(labels=[...])"), **_options(task)}
    return {"head": "frozen", **table} if task.traits.generates else table


def adapter_table(adapter: Any) -> dict[str, Any]:
    """[adapter], from an adapter.

    Raises:
        ConfigError: It is no installed kind.
    """
    return {"kind": _name("adapters", adapter, "fl.LoRA(rank=8)"), **_options(adapter)}


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
    installed = _installed_as("strategies", strategy)
    if installed is None:
        return {"name": kind.__name__, "options": dict(_scalars(strategy))}, strategy
    if not is_dataclass(strategy):
        raise ConfigError(
            f"the options of {kind.__name__} cannot be read off the object, which is no dataclass; give "
            f'fl.Strategy(name="{installed}", options={{...}})'
        )
    return {"name": installed, "options": dict(_scalars(strategy))}, None


def _scalars(strategy: object) -> Iterator[tuple[str, Any]]:
    """Options that differ from their defaults, but for what the run file sets by model.head."""
    for field in fields(strategy) if is_dataclass(strategy) else ():
        value = getattr(strategy, field.name)
        named = field.init and field.name != "train_head" and isinstance(value, bool | int | float | str)
        if named and (field.default is MISSING or value != field.default):
            yield field.name, value


def _name(group: str, component: Any, example: str) -> str:
    """The name under which a component's class is installed.

    Raises:
        ConfigError: It is no object of an installed class.
    """
    noun, kind = registry.noun(group), type(component)
    if (found := _installed_as(group, component)) is not None:
        return found
    if isinstance(component, type) or not isinstance(component, Section):
        shown = f"the class {component.__name__}" if isinstance(component, type) else repr(component)
        raise ConfigError(f"{noun} is {shown}; give an object such as {example}")
    raise ConfigError(
        f"{noun} {kind.__name__} is defined in this process only; register it under the entry-point group "
        f"fedloom.{group} of a package that is installed here, see `fedloom components new {group} NAME`"
    )


def _installed_as(group: str, component: object) -> str | None:
    """The name under which an object's class is installed; None if it is not."""
    kind = type(component)
    home = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, entry in registry.entries(group).items() if entry.value == home), None)


def _options(component: BaseModel) -> dict[str, Any]:
    """The options that were set."""
    return component.model_dump(mode="json", exclude_unset=True, exclude_none=True)
