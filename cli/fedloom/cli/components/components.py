"""`fedloom components`: what is installed, ours and others', in every group."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, failed, out, print_json

__all__ = ["app", "check", "list_", "new", "schema", "show"]

app = typer.Typer(help="Strategies, codecs and all else that can be named in a run, ours and others'.")

Group = Annotated[str, typer.Argument(help="Group as in `fedloom components list`.")]
AnyGroup = Annotated[str | None, typer.Argument(help="One group; all of them without.")]
Name = Annotated[str, typer.Argument(help="Name as in `fedloom components list`.")]


@app.command("list")
def list_(group: AnyGroup = None, json_only: Json = False) -> None:
    """List every installed component with its package and version, importing none.

    Example: fedloom components list strategies
    """
    from fedloom.core.docstrings import summary_of
    from fedloom.core.registry import GROUPS, entries

    found = [
        {"group": each, **asdict(entry), "summary": summary_of(entry.value)}
        for each in ([group] if group else GROUPS)
        for entry in entries(each).values()
    ]
    if json_only:
        print_json(found)
        return
    table = Table("group", "name", "from", "version", "summary", box=None, pad_edge=False)
    for row in found:
        table.add_row(row["group"], row["name"], row["distribution"], row["version"], row["summary"])
    out.print(table)


@app.command()
def show(group: Group, name: Name, json_only: Json = False) -> None:
    """Show one component's description and options; with --json, the JSON Schema of its options.

    Example: fedloom components show strategies fedsvd
    """
    from fedloom.core.docstrings import prose
    from fedloom.core.registry import entries, load, options_model

    made_by, entry = load(group, name), entries(group)[name]
    text, schema = inspect.getdoc(made_by) or "", options_model(group, name).model_json_schema()
    if json_only:
        print_json({"group": group, **asdict(entry), "description": text, "options": schema})
        return
    out.print(prose(text))
    out.print(f"\n{entry.value}, of {entry.distribution} {entry.version}")
    if options := schema.get("properties"):
        table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
        required = schema.get("required", ())
        for key, spec in options.items():
            default = "required" if key in required else json.dumps(spec.get("default"))
            table.add_row(key, _type(spec), default, spec.get("description", ""))
        out.print()
        out.print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a run file with all that is installed, for an editor: names, options and their ranges.

    Example: fedloom components schema > run.schema.json
    """
    from fedloom.core.config.json_schema import run_file_schema

    print_json(run_file_schema())


@app.command()
def check(group: AnyGroup = None, json_only: Json = False) -> None:
    """Import every installed component and say what is wrong with it; exit status 1 if anything is.

    Example: fedloom components check codecs
    """
    from fedloom.core.registry import GROUPS, entries, faults

    names = [(each, name) for each in ([group] if group else GROUPS) for name in entries(each)]
    found = [fault for each, name in names for fault in faults(each, name)]
    if json_only:
        print_json({"checked": len(names), "faults": found})
    else:
        for fault in found:
            failed(fault)
        out.print(f"{len(names)} components checked, {len(found)} faults")
    if found:
        raise typer.Exit(1)


@app.command()
def new(
    group: Group,
    name: Annotated[str, typer.Argument(help="Name for run files: lower-case letters, digits and hyphens.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder in which the package's own folder is made.")] = Path(),
) -> None:
    """Write a small package for a component of your own, with a test that fails until it is written.

    Example: fedloom components new codecs nf4
    """
    from fedloom.cli.components.skeleton import write_package

    made = write_package(group, name, folder)
    out.print(f"wrote {made}; install it, write it, and test it:")
    out.print(f"  pip install --no-deps -e {made}\n  pytest {made}\n  fedloom components check {group}")


def _type(spec: dict[str, Any]) -> str:
    """A type as a run file's author sees it: its name, or the values to choose from."""
    choices = [each for each in spec.get("anyOf", [spec]) if each.get("type") != "null"]
    return " or ".join(
        " or ".join(map(json.dumps, each["enum"])) if "enum" in each else str(each.get("type", "any"))
        for each in choices
    )
