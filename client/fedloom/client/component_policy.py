"""Which components a run may use at a site: what comes with fedloom, and what the site names."""

import json
from collections.abc import Iterable, Mapping

from fedloom.core.config.parsing import Section
from fedloom.core.registry import HERE, OURS, entries, noun

__all__ = ["ComponentsPolicy", "component_problems"]

Names = tuple[str, ...]


class ComponentsPolicy(Section):
    """[components]: what of this machine's packages a run may use here, by name.

    In each list "fedloom" stands for all that come with fedloom and "*" for all that are installed.
    """

    adapters: Names = (OURS,)
    """Adapter kinds."""
    tasks: Names = (OURS,)
    """Tasks."""
    optimizers: Names = (OURS,)
    """Optimizers."""
    codecs: Names = (OURS,)
    """Codecs of adapters and updates."""
    data: Names = (OURS,)
    """Data sources that data.source of this file may name."""


def component_problems(mine: ComponentsPolicy, asked: Mapping[str, Iterable[str]]) -> list[str]:
    """What a run asks for that is not installed here or not allowed, with what to do. Nothing is imported.

    Args:
        mine: The site's lists.
        asked: Names of components by group.
    """
    problems = []
    for group, names in asked.items():
        allowed, found = getattr(mine, group), entries(group)
        for name in dict.fromkeys(names):
            entry = found.get(name)
            if entry is None:
                problems.append(f"{noun(group)} {name!r}, which is not installed here (installed: {', '.join(found)})")
            elif not {"*", name, *([OURS] if entry.ours else [])} & set(allowed):
                shown = json.dumps(list(allowed))
                origin = HERE if entry.distribution == HERE else f"the package {entry.distribution}"
                problems.append(
                    f'{noun(group)} {name!r} of {origin} (components.{group} = {shown}; add "{name}" to allow it)'
                )
    return problems
