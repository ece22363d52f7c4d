"""`fedloom data`: what a data owner should know about the data before joining a run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out

if TYPE_CHECKING:
    from fedloom.client.doctor.data_report import Report

__all__ = ["app", "check"]

app = typer.Typer(help="This site's own data.", no_args_is_help=True)

_SHOWN = 30

_COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold"}


@app.callback()
def _group() -> None:
    """Keeps `check` a subcommand while it is the only one."""


@app.command()
def check(
    policy: Annotated[Path, typer.Argument(help="This site's policy file.")],
    run: Annotated[
        Path | None, typer.Option(help="The run file; without it, only the data itself is looked at.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the run file, such as model.max_length=96.")
    ] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print one line of JSON only.")] = False,
) -> None:
    """Read this site's data as a run would and say what is wrong, what is lost, and what the run would cost.

    It trains nothing, charges nothing and sends nothing. What it prints is exact and about your data: it is for you
    alone. Exit status 1 when the run would be refused here or would stop.

    Example: fedloom data check client.toml --run run.toml
    """
    from fedloom.client.doctor.data_report import check as checked
    from fedloom.client.policy import load_policy
    from fedloom.core.config.run import load_run
    from fedloom.server.build import calibrated

    site = load_policy(policy)
    config = calibrated(load_run(run, tuple(overrides or ()))) if run else None
    report = checked(site, config.spec if config else None)
    if json_only:
        typer.echo(json.dumps(report.document()))
    else:
        _show(report)
    if not report.sound:
        raise typer.Exit(1)


def _show(report: "Report") -> None:
    found = report.survey
    groups = f" in {_counted(found.groups, 'group')}" if found.groups else ""
    out.print(f"{_counted(found.rows, 'row')}{groups} for {found.task}, {len(found.usable):,} of them usable")
    for name, count in found.labels.most_common(_SHOWN):
        out.print(f"  {count:>9,}  {name}")
    if len(found.labels) > _SHOWN:
        out.print(f"  and {_counted(len(found.labels) - _SHOWN, 'label')} more")
    if report.lengths:
        tokens = report.lengths
        out.print(f"tokens: {tokens.median} at the median, {tokens.ninety_fifth} at 95 %, {tokens.longest} at most")
    if report.cost:
        cost = report.cost
        out.print(
            f"privacy: epsilon {cost.before:.4f} is spent and the run's {cost.rounds} rounds bring it to "
            f"{cost.after:.4f} of {cost.budget:g}, at delta {cost.delta:g}"
        )
    for finding in report.findings:
        out.print(f"[{_COLOURS[finding.level]}]{finding.level}:[/] ", end="", markup=True)
        out.print(finding.text)
    out.print("training would take this data" if report.sound else "training would refuse this data; see the errors")


def _counted(number: int, name: str) -> str:
    """A number of things.

    >>> _counted(1, "row"), _counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {name}{'s' * (number != 1)}"
