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
    methods: tuple[str, ...] = ()
    """What is to be written of a class that has defaults for all it does; () is what is abstract, or all there is."""
    traits: str = ""
    """What its class declares about itself, to be changed; the class is then a `Section`."""
    battery_name: bool = False
    """The battery looks the component up by its name."""
    arguments: str = ""
    """Options with which it is tested."""


_SHAPES = {
    "strategies": _Shape(
        "fedloom.strategies.api:Strategy", "fedloom.strategies.conformance:StrategyConformance", "strategy"
    ),
    "adapters": _Shape(
        "fedloom.client.adapters.api:Adapter",
        "fedloom.conformance.adapters:AdapterConformance",
        "adapter",
        traits="Traits()",
    ),
    "tasks": _Shape(
        "fedloom.client.tasks.api:Task",
        "fedloom.conformance.tasks:TaskConformance",
        "task",
        methods=("read", "document", "sample", "loss", "right"),
        traits='Traits("text and label", "AutoModelForSequenceClassification", "SEQ_CLS")',
        battery_name=True,
        arguments='labels=("a", "b")',
    ),
    "optimizers": _Shape(
        "fedloom.client.optimizers.api:Optimizer", "fedloom.conformance.optimizers:OptimizerConformance", "optimizer"
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


{decorator}class {kind}{base}:
    """Say in one line what it does; `fedloom components list` shows this line.

    Annotated fields here, such as `rate: float = 0.5`, are its options; describe each {where}.
    """

{traits}{methods}
'''

_TEST = '''"""{kind} passes fedloom's battery."""

from {module} import {kind}

{battery}
from fedloom.core.registry import faults


class Test{kind}({battery_kind}):
    """What holds for every {noun}."""

{attributes}    def {subject}(self) -> {kind}:
        """The {noun} under test."""
        return {kind}({arguments})


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
    home = folder / f"fedloom-{name}"
    if home.exists():
        raise ConfigError(f"{home} exists; move it away, or choose another --out")
    shape, kind, module = _SHAPES[group], "".join(map(str.capitalize, name.split("-"))), f"fedloom_{name}"
    module = module.replace("-", "_")
    imports, base, methods = _bodies(shape)
    is_section = bool(shape.traits)
    battery_module, _, battery = shape.battery.partition(":")
    words = {"name": name, "group": group, "noun": what, "module": module, "kind": kind, "subject": shape.subject}
    words |= {"battery": f"from {battery_module} import {battery}", "battery_kind": battery}
    words |= {
        "arguments": shape.arguments,
        "attributes": f'    name = "{name}"\n\n' if shape.battery_name else "",
        "decorator": "" if is_section else "@dataclass\n",
        "where": "in a string below it" if is_section else 'below "Args:"',
        "traits": f"    traits: ClassVar[Traits] = {shape.traits}\n\n" if is_section else "",
    }
    home.mkdir(parents=True)
    (home / "pyproject.toml").write_text(_PYPROJECT.format(**words), encoding="utf-8")
    (home / f"{module}.py").write_text(
        _MODULE.format(**words, imports=imports, base=base, methods=methods), encoding="utf-8"
    )
    (home / f"test_{name.replace('-', '_')}.py").write_text(_TEST.format(**words), encoding="utf-8")
    return home


def _bodies(shape: _Shape) -> tuple[str, str, str]:
    """The imports, the base class and the methods of a class that fits a protocol."""
    module_name, _, kind = shape.protocol.partition(":")
    module = importlib.import_module(module_name)
    source = ast.parse(inspect.getsource(module))
    methods = list(_methods(getattr(module, kind), module))
    # A protocol that implements some of its methods is to be inherited from; what is abstract is left to write.
    abstract = [
        each
        for each in methods
        if each.name in shape.methods or "abstractmethod" in map(ast.unparse, each.decorator_list)
    ]
    base = kind if abstract else "Section" if shape.traits else ""
    for each in methods:
        each.decorator_list = [one for one in each.decorator_list if ast.unparse(one) != "abstractmethod"]
    text = " ".join(ast.unparse(part) for each in abstract or methods for part in (each.args, each.returns) if part)
    used = {base, *re.findall(r"\w+", text), *(("ClassVar", "Traits") if shape.traits else ())}
    lines = {*([] if shape.traits else ["from dataclasses import dataclass"]), *_imports(source.body, used)}
    defined = {node.name for node in source.body if isinstance(node, ast.ClassDef)}
    defined |= {ast.unparse(node.targets[0]) for node in source.body if isinstance(node, ast.Assign)}
    if base == "Section":
        lines.add("from fedloom.core.config.parsing import Section")
    if defined & used:
        lines.add(f"from {module_name} import {', '.join(sorted(defined & used))}")
    guarded = [line for node in source.body if isinstance(node, ast.If) for line in _imports(node.body, used)]
    guarded.sort(key=lambda line: "fedloom" in line)
    if guarded:
        lines = {line for line in lines if not line.startswith("from typing ")}
        lines.add("from typing import " + ", ".join(["TYPE_CHECKING", *sorted({"Any", "ClassVar"} & used)]))
    ours = sorted(line for line in lines if "fedloom" in line)
    blocks = [sorted(lines - set(ours)), ours, ["if TYPE_CHECKING:", *(f"    {line}" for line in guarded)]]
    imports = "\n\n".join("\n".join(block) for block in blocks if block and block != ["if TYPE_CHECKING:"])
    return imports, base and f"({base})", "\n\n".join(_indented(each) for each in abstract or methods)


def _imports(body: list[ast.stmt], used: set[str]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if names := sorted(each.name for each in node.names if each.name in used):
                yield f"from {node.module} import {', '.join(names)}"
        elif isinstance(node, ast.Import):
            yield from (f"import {ast.unparse(each)}" for each in node.names if (each.asname or each.name) in used)


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
