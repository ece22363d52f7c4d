"""`fedloom strategies`: what can be named in [strategy]."""

import inspect
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json

__all__ = ["app", "list_", "show"]

app = typer.Typer(help="Aggregation strategies that are installed, ours and others'.", no_args_is_help=True)


@app.command("list")
def list_(json_only: Json = False) -> None:
    """List every registered strategy with its version and origin.

    Example: fedloom strategies list
    """
    from fedloom.strategies.registry import available

    if json_only:
        print_json([asdict(entry) for entry in available()])
        return
    table = Table("name", "from", "version", "summary", box=None, pad_edge=False)
    for entry in available():
        table.add_row(entry.name, entry.distribution, entry.version, entry.summary)
    out.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name as in `fedloom strategies list`.")], json_only: Json = False
) -> None:
    """Show one strategy's description and options.

    Example: fedloom strategies show fedsvd
    """
    from fedloom.strategies.registry import factory

    made_by = factory(name)
    options = inspect.signature(made_by).parameters.values()
    if json_only:
        rows = [
            {"name": each.name, "type": _kind(each.annotation), "required": each.default is each.empty}
            | ({} if each.default is each.empty else {"default": each.default})
            for each in options
        ]
        print_json({"name": name, "description": inspect.getdoc(made_by) or "", "options": rows})
        return
    out.print(inspect.getdoc(made_by) or "")
    table = Table("option", "type", "default", box=None, pad_edge=False)
    for option in options:
        table.add_row(
            option.name, _kind(option.annotation), "" if option.default is option.empty else repr(option.default)
        )
    out.print()
    out.print(table)
    out.print("\ntrain_head is set by model.head of the run file; the others go into \\[strategy] options = { ... }")


def _kind(annotation: Any) -> str:
    """A type as a run file's author sees it: its name, or the values to choose from."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    return getattr(annotation, "__name__", str(annotation))
