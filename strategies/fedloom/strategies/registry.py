"""Strategies by name: whatever is installed under the entry-point group `fedloom.strategies`, ours included."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, cast, get_args, get_origin

from fedloom.core.errors import ConfigError
from fedloom.strategies.api import Strategy

__all__ = ["GROUP", "Entry", "available", "factory", "load"]

GROUP = "fedloom.strategies"
"""The entry-point group a distribution registers its strategies in."""

_OWN, _INHERITED = ("init", "plan", "fold", "commit"), ("result", "traits")


@dataclass(frozen=True)
class Entry:
    """One registered strategy."""

    name: str
    version: str
    """Version of the distribution that brings it."""
    distribution: str
    summary: str
    """First line of its docstring, or why it cannot be loaded."""


def available() -> list[Entry]:
    """Every registered strategy, by name; one that cannot be imported says so in its summary.

    Raises:
        ConfigError: Two distributions register the same name.
    """
    return [_entry(point) for _, point in sorted(_points().items())]


def load(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy called `name`, built with `options` as keyword arguments.

    Only installed entry points are looked at; `name` is never imported.

    Raises:
        ConfigError: The name is unknown or taken twice, an option is unknown, missing or of the wrong type, or what
            is registered is not a strategy.
    """
    make = factory(name)
    _check_options(name, make, options)
    try:
        strategy = make(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name!r} refuses its options {dict(options)}: {error}") from error
    missing = [each for each in (*_OWN, *_INHERITED) if not _has(strategy, each)]
    if missing:
        raise ConfigError(
            f"{_points()[name].value} is no strategy: it lacks {', '.join(missing)}; subclass "
            f"fedloom.strategies.api.Strategy and define {', '.join(_OWN)}"
        )
    return cast(Strategy, strategy)


def _has(strategy: object, method: str) -> bool:
    """Whether it has a method of its own; two of them may be inherited from the interface."""
    found = inspect.getattr_static(strategy, method, None)
    return found is not None and (method in _INHERITED or found is not vars(Strategy)[method])


def factory(name: str) -> Callable[..., object]:
    """What makes the strategy called `name`: its class, or a function; its docstring and parameters describe it.

    Raises:
        ConfigError: The name is unknown or taken twice, or what is registered cannot be imported.
    """
    points = _points()
    if name not in points:
        raise ConfigError(f"unknown strategy {name!r}; {_nearest(name, sorted(points))}")
    return _imported(points[name])


def _points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        # The same distribution may be seen twice (an editable install next to its build); that is no conflict.
        if _origin(other)[0] != _origin(point)[0]:
            raise ConfigError(
                f"strategy {point.name!r} is registered by both {_origin(other)[0]} and {_origin(point)[0]};"
                " uninstall one of them"
            )
    return found


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Distribution name and version."""
    if point.dist is None:
        return "unknown", "0"
    return point.dist.name, point.dist.version


def _imported(point: EntryPoint) -> Callable[..., object]:
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"strategy {point.name!r} of {_origin(point)[0]} cannot be imported: {error}; reinstall that package"
        ) from error
    if not callable(factory):
        raise ConfigError(f"strategy {point.name!r} of {_origin(point)[0]} is not callable; register its class")
    return cast(Callable[..., object], factory)


def _entry(point: EntryPoint) -> Entry:
    distribution, version = _origin(point)
    try:
        summary = (inspect.getdoc(_imported(point)) or "").partition("\n")[0]
    except ConfigError as error:
        summary = str(error)
    return Entry(point.name, version, distribution, summary)


def _nearest(word: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}available: {', '.join(allowed) or 'none'}"


def _check_options(name: str, factory: Callable[..., object], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory, eval_str=True).parameters
    shown = ", ".join(_shown(each) for each in parameters.values()) or "none"
    for option, value in options.items():
        if option not in parameters:
            raise ConfigError(
                f"strategy {name!r} has no option {option!r}; {_nearest(option, sorted(parameters))} ({shown})"
            )
        if not _fits(value, parameters[option].annotation):
            raise ConfigError(f"option {option!r} of strategy {name!r} is {value!r}; allowed: {shown}")
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in options]
    if missing:
        raise ConfigError(f"strategy {name!r} needs option {missing[0]!r}; allowed: {shown}")


def _shown(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    if get_origin(kind) is Literal:
        text = " | ".join(repr(choice) for choice in get_args(kind))
    else:
        text = "any" if kind is parameter.empty else getattr(kind, "__name__", str(kind))
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {text}{default}"


def _fits(value: object, kind: Any) -> bool:
    """Whether an option fits its annotation; an annotation other than a plain scalar is the strategy's to check."""
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (bool, int, str) else True
