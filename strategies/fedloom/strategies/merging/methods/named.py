"""The methods of merging by their names, with the options that each takes."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields

from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.methods.api import Method
from fedloom.strategies.merging.methods.breadcrumbs import Breadcrumbs
from fedloom.strategies.merging.methods.dare import Dare
from fedloom.strategies.merging.methods.lines import LiNeS
from fedloom.strategies.merging.methods.soup import Soup
from fedloom.strategies.merging.methods.task_arithmetic import TaskArithmetic
from fedloom.strategies.merging.methods.ties import Ties

__all__ = ["METHODS", "method_named"]

METHODS: Mapping[str, type[Method]] = {
    "soup": Soup,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "breadcrumbs": Breadcrumbs,
    "lines": LiNeS,
}
"""What makes each method."""


def method_named(name: str, options: Mapping[str, float]) -> Method:
    """The method called `name` with its options.

    Args:
        name: One of `METHODS`.
        options: Those that are not to have their default.

    Raises:
        ConfigError: There is no such method, or it has no such option, needs one, or refuses a value.

    >>> method_named("ties", {"density": 0.5})
    Ties(density=0.5, scaling=1.0)
    """
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}; available: {', '.join(METHODS)}")
    makes = METHODS[name]
    known = list(inspect.signature(makes).parameters)
    for option in options:
        if option not in known:
            having = [each for each, other in METHODS.items() if option in inspect.signature(other).parameters]
            raise ConfigError(
                f"{name} takes no {option} ({', '.join(known) or 'it has no options'}); leave it out, or take a method "
                f"that does: {', '.join(having) or 'none'}"
            )
    needed = [each.name for each in fields(makes) if each.default is MISSING]  # type: ignore[arg-type]
    if missing := [each for each in needed if each not in options]:
        raise ConfigError(f"{name} needs a value for {missing[0]!r}; give --{missing[0]}")
    return makes(**options)
