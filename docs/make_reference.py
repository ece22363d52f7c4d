"""Write docs/reference.md from the code it describes; `--check` exits 1 when the file is not what would be written."""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from docs.made import write
from fedloom.cli.main import app
from fedloom.client.policy import Policy
from fedloom.core import errors
from fedloom.core.config.run import RunConfig
from fedloom.core.docstrings import prose
from fedloom.core.registry import GROUPS, entries, load, options_model
from fedloom.proto.wire import STATUS

__all__ = ["main", "reference"]

TARGET = Path(__file__).with_name("reference.md")

_INTRODUCTION = """# Reference

Made from the code by `python -m docs.make_reference`; do not edit it by hand.
A run file and a policy file are TOML. Unknown keys are refused, and every key can be overridden with
`--set section.key=value`."""

_RANGES = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "matches `{}`",
}


def reference() -> str:
    """The whole document."""
    parts = [
        _INTRODUCTION,
        "## Run file",
        *_tables(RunConfig),
        "## Policy file",
        "What a client's own site allows, whatever a coordinator asks.",
        *_tables(Policy),
        "## Commands",
        *_commands(typer.main.get_command(app), "fedloom"),
        "## Errors",
        "An error of ours ends a command with one line on standard error and exit status 2. Between a client and a "
        "coordinator it travels as the gRPC status beside it.",
        *_errors(),
        "## Components",
        "Those that come with fedloom, by group; `fedloom components list` also shows what else is installed.",
        *(text for group in GROUPS for text in _components(group)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the file, or with `--check` only compare it."""
    write("make_reference", {TARGET: reference()})


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _tables(model: type[BaseModel]) -> Iterator[str]:
    """One heading and one table of keys for each section of a file."""
    document = model.model_json_schema()
    for name, entry in document["properties"].items():
        section = document["$defs"][_definition(entry)]
        needed = "required" if name in document.get("required", ()) else "optional"
        yield f"### [{name}] ({needed})"
        about = section["description"].partition(": ")[2]
        yield about[:1].upper() + about[1:]
        required = section.get("required", ())
        rows = [_key(f"{name}.{key}", spec, key in required) for key, spec in section["properties"].items()]
        yield _table(("key", "type", "default", "allowed", "meaning"), rows)


def _definition(entry: dict[str, Any]) -> str:
    """The name of the section a property refers to, which may be left out of the file."""
    choices = [entry, *entry.get("anyOf", ())]
    (name,) = (str(choice["$ref"]).rpartition("/")[2] for choice in choices if "$ref" in choice)
    return name


def _key(path: str, spec: dict[str, Any], required: bool) -> tuple[str, ...]:
    choices = [choice for choice in spec.get("anyOf", [spec]) if choice.get("type") != "null"]
    # A key without a default that may be left out is a table, made anew for each file and so absent from the schema.
    value = spec.get("default", {})
    default = "required" if required else "none" if value is None else f"`{json.dumps(value)}`"
    # The choices of a table's values are its type, not alternatives of the key.
    allowed = _allowed(choices[0]) if len(choices) == 1 else ""
    return f"`{path}`", " or ".join(_type(choice) for choice in choices), default, allowed, spec["description"]


def _type(spec: dict[str, Any]) -> str:
    match spec.get("type"):
        case "array":
            return f"list of {_type(spec['items'])}s"
        case "object":
            values = spec["additionalProperties"]
            return "table of " + ", ".join(_type(value) for value in values.get("anyOf", [values]))
        case kind:
            return "path" if spec.get("format") == "path" else str(kind)


def _allowed(spec: dict[str, Any]) -> str:
    words = spec.get("enum") or ([spec["const"]] if "const" in spec else spec.get("items", {}).get("enum", []))
    if words:
        return ", ".join(f"`{json.dumps(word)}`" for word in words)
    return ", ".join(text.format(_number(spec[key])) for key, text in _RANGES.items() if key in spec)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _commands(command: Any, path: str) -> Iterator[str]:
    """A command's heading, help and parameters, then those of its subcommands."""
    about, _, example = (command.help or "").partition("Example:")
    yield f"### `{path}`"
    yield "\n".join(line.strip() for line in about.strip().splitlines())
    if example:
        yield f"```sh\n{example.strip()}\n```"
    rows = [_parameter(each) for each in command.params if not each.hidden and "completion" not in each.name]
    if rows:
        yield _table(("parameter", "default", "meaning"), rows)
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{path} {name}")


def _parameter(each: Any) -> tuple[str, ...]:
    is_option = each.param_type_name == "option"
    names = [*each.opts, *each.secondary_opts] if is_option else [each.name.upper()]
    value = " VALUE" if is_option and not each.is_flag else ""
    if each.required:
        default = "required"
    elif each.default is None:
        default = "none"
    else:
        switch = {True: "on", False: "off"}
        default = switch[each.default] if isinstance(each.default, bool) else f"`{each.default}`"
    more = " May be repeated." if each.multiple or each.nargs == -1 else ""
    return ", ".join(f"`{name}{value}`" for name in names), default, f"{each.help}{more}"


def _errors() -> Iterator[str]:
    rows = []
    for name in errors.__all__:
        kind = getattr(errors, name)
        parent = "" if kind is errors.FedloomError else f"`{kind.__base__.__name__}`"
        rows.append((f"`{name}`", parent, f"`{STATUS[kind]}`", inspect.getdoc(kind) or ""))
    yield _table(("error", "is a", "gRPC status", "meaning"), rows)


def _components(group: str) -> Iterator[str]:
    # Only ours: what else is installed on the machine that writes this file is no part of fedloom.
    ours = [name for name, entry in entries(group).items() if entry.ours]
    if ours:
        yield f"## {group.capitalize()}"
    for name in ours:
        yield f"### `{name}`"
        yield prose(inspect.getdoc(load(group, name)) or "")
        document = options_model(group, name).model_json_schema()
        rows = [_option(key, spec, document) for key, spec in document.get("properties", {}).items()]
        yield _table(("option", "type", "default", "allowed", "meaning"), rows) if rows else "It has no options."


def _option(name: str, spec: dict[str, Any], document: dict[str, Any]) -> tuple[str, ...]:
    return _key(name, {"description": "", **spec}, name in document.get("required", ()))


if __name__ == "__main__":
    main()
