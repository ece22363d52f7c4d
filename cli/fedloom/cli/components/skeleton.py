"""A package for a component of one's own: a pyproject, a module without bodies, and a test that fails without them.

The methods come from the group's protocol, and so do their docstrings and imports.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.core.errors import ConfigError
from fedloom.core.registry import entries, noun

__all__ = ["write_package"]


class _Shape(NamedTuple):
    protocol: str
    """What a component is, as `module:class`."""
    battery: str
    """What tests it, likewise."""
    subject: str
    """The battery's method that gives it."""


_SHAPES = {
    "strategies": _Shape(
        "fedloom.strategies.api:Strategy", "fedloom.strategies.conformance:StrategyConformance", "strategy"
    ),
    "codecs": _Shape("fedloom.core.codecs.api:Codec", "fedloom.conformance.codecs:CodecConformance", "codec"),
    "data": _Shape("fedloom.client.data.packaged.api:DataSource", "fedloom.conformance.data:DataConformance", "source"),
    "partitioners": _Shape(
        "fedloom.client.data.partitioners.api:Partitioner",
        "fedloom.conformance.partitioners:PartitionerConformance",
        "partitioner",
    ),
    "recorders": _Shape(
        "fedloom.server.monitoring.recorders.api:Recorder",
        "fedloom.conformance.recorders:RecorderConformance",
        "recorder",
    ),
}

_PYPROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "fedloom-{name}"
version = "0.1.0"
description = "The {noun} {name} for fedloom"
requires-python = ">=3.11"
dependencies = ["fedloom"]

[project.entry-points."fedloom.{group}"]
{name} = "{module}:{kind}"

[tool.hatch.build.targets.wheel]
include = ["{module}.py"]
"""

_MODULE = '''"""{kind}: say in one line what it is, with the paper."""

{imports}

__all__ = ["{kind}"]


@dataclass
class {kind}:
    """Say in one line what it does; `fedloom components list` shows this line.

    Annotated fields here, such as `rate: float = 0.5`, are its options; describe each below "Args:".
    """

{methods}
'''

_TEST = '''"""{kind} passes fedloom's battery."""

from {module} import {kind}

{battery}
from fedloom.core.registry import faults


class Test{kind}({battery_kind}):
    """What holds for every {noun}."""

    def {subject}(self) -> {kind}:
        """The {noun} under test."""
        return {kind}()


def test_it_is_found_by_name() -> None:
    """After `pip install -e .`."""
    assert faults("{group}", "{name}") == []
'''


def write_package(group: str, name: str, folder: Path) -> Path:
    """Write the package into a new folder of `folder`, and return that.

    Raises:
        ConfigError: There is no such group, the name cannot be one or is taken, or the folder is there.
    """
    taken, what = entries(group), noun(group)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"{name!r} cannot name a {what}; lower-case letters, digits and single hyphens are allowed")
    if name in taken:
        raise ConfigError(f"there is a {what} {name!r} already, of {taken[name].distribution}; choose another name")
    if group not in _SHAPES:
        raise ConfigError(f"there is no skeleton for a {what} yet; {', '.join(_SHAPES)} have one")
    home = folder / f"fedloom-{name}"
    if home.exists():
        raise ConfigError(f"{home} exists; move it away, or choose another --out")
    shape, kind, module = _SHAPES[group], "".join(map(str.capitalize, name.split("-"))), f"fedloom_{name}"
    module = module.replace("-", "_")
    imports, methods = _bodies(shape.protocol)
    battery_module, _, battery = shape.battery.partition(":")
    words = {"name": name, "group": group, "noun": what, "module": module, "kind": kind, "subject": shape.subject}
    words |= {"battery": f"from {battery_module} import {battery}", "battery_kind": battery}
    home.mkdir(parents=True)
    (home / "pyproject.toml").write_text(_PYPROJECT.format(**words), encoding="utf-8")
    (home / f"{module}.py").write_text(_MODULE.format(**words, imports=imports, methods=methods), encoding="utf-8")
    (home / f"test_{name.replace('-', '_')}.py").write_text(_TEST.format(**words), encoding="utf-8")
    return home


def _bodies(protocol: str) -> tuple[str, str]:
    """The imports and the methods of a class that fits a protocol."""
    module_name, _, kind = protocol.partition(":")
    module = importlib.import_module(module_name)
    source = ast.parse(inspect.getsource(module))
    methods = list(_methods(getattr(module, kind), module))
    used = {node.id for each in methods for node in ast.walk(each) if isinstance(node, ast.Name)}
    lines = {"from dataclasses import dataclass"}
    for node in source.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if names := sorted(each.name for each in node.names if each.name in used):
                lines.add(f"from {node.module} import {', '.join(names)}")
        elif isinstance(node, ast.Import):
            lines |= {f"import {ast.unparse(each)}" for each in node.names if (each.asname or each.name) in used}
    defined = {node.name for node in source.body if isinstance(node, ast.ClassDef)}
    defined |= {ast.unparse(node.targets[0]) for node in source.body if isinstance(node, ast.Assign)}
    if defined & used:
        lines.add(f"from {module_name} import {', '.join(sorted(defined & used))}")
    ours = sorted(line for line in lines if "fedloom" in line)
    others = sorted(lines - set(ours))
    text = "\n".join(others) + "\n\n" + "\n".join(ours) if ours else "\n".join(others)
    return text, "\n\n".join(_indented(each) for each in methods)


def _methods(kind: type[Any], module: Any) -> Iterator[ast.FunctionDef]:
    for each in reversed(kind.__mro__):
        if each.__module__ == module.__name__:
            (node,) = ast.parse(inspect.getsource(each)).body
            assert isinstance(node, ast.ClassDef)
            yield from (item for item in node.body if isinstance(item, ast.FunctionDef))


def _indented(method: ast.FunctionDef) -> str:
    """The method with its docstring, and a body that says what is missing."""
    about = ast.get_docstring(method) or ""
    end = "\n    " if "\n" in about else ""
    method.body = [ast.Expr(ast.Constant(about.replace("\n", "\n    ") + end))]
    said = f"{method.name} is not written yet; its docstring says what it does"
    lines = [*ast.unparse(method).splitlines(), f'    raise NotImplementedError("{said}")']
    return "\n".join(f"    {line}".rstrip() for line in lines)
