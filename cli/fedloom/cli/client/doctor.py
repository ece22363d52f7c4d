"""`fedloom doctor`: what would keep a site from taking part, before it tries."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedloom.cli.console import out
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.core.config.run import Spec

__all__ = ["doctor"]

_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    policy: Annotated[
        Path | None, typer.Argument(help="This site's policy file; --plan alone does without one.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of the coordinator, HOST:PORT; without it the network is left out.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run file, to look at its policy, budget, rows, layers and sensitivity as well.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Run file: print what training it takes of memory, before anything is loaded, and look at nothing "
            "else. Device and precision are the policy's, or without one those of the run's engine."
        ),
    ] = None,
    certs: Annotated[
        Path | None,
        typer.Option(help="Folder that `fedloom certs enrol` wrote; certs in the state folder, otherwise."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure-loopback", help="The coordinator has no certificates; loopback addresses only.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on a warning.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a policy key, such as compute.device=cuda.")
    ] = None,
) -> None:
    """Look at this machine, its ledger, data and base model, and at the way to the coordinator; change nothing.

    No run is joined and no data is sent. One line for each check, with what to do. Exit status 0 when a client can take
    part, 2 when it cannot, and with --strict 1 when there are warnings.

    Example: fedloom doctor client.toml --server fl.example.org:8470 --run run.toml
    """
    if plan is not None:
        _plan(plan, policy, tuple(overrides or ()), as_json=as_json)
        return
    if policy is None:
        raise ConfigError("no policy file was given; give one, or a run file with --plan")
    from fedloom.client.doctor import examine
    from fedloom.client.policy import load_policy

    site = load_policy(policy, tuple(overrides or ()))
    folder = None if insecure else certs or site.client.state / "certs"
    findings = []
    for finding in examine(site, server=server, certs=folder, spec=None if run is None else _spec(run)):
        findings.append(finding)
        if not as_json:
            out.print(f"[{_MARKS[finding.level]}]{finding.level:>7}[/]  {finding.check:<12}", end="", markup=True)
            out.print(finding.text)
            if finding.remedy:
                out.print(f"{'':23}{finding.remedy}")
    levels = [finding.level for finding in findings]
    status = 2 if "failed" in levels else 1 if strict and "warning" in levels else 0
    if as_json:
        typer.echo(json.dumps({"status": status, "findings": [asdict(finding) for finding in findings]}))
    if status:
        raise typer.Exit(status)


def _plan(run: Path, policy: Path | None, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """What training a run takes of memory; exit status 2 where not one example fits."""
    from fedloom.client.doctor.plan import plan_memory
    from fedloom.client.policy import ComputePolicy, load_policy
    from fedloom.core.config.run import load_run

    config = load_run(run, () if policy else overrides)
    site = load_policy(policy, overrides) if policy else None
    compute = site.compute if site else ComputePolicy.of(config.engine)
    made = plan_memory(config.spec, compute, site.model.folder if site else None)
    if as_json:
        typer.echo(json.dumps({**asdict(made), "device": str(made.device), "total": made.total}))
    else:
        table = Table("part", "MiB", "in", box=None, pad_edge=False)
        for part in made.parts:
            table.add_row(part.name, f"{part.bytes / 2**20:,.1f}", "cpu" if part.on_host else str(made.device))
        table.add_row("together", f"{made.total / 2**20:,.1f}", str(made.device))
        out.print(table)
        free = "unknown" if made.free is None else f"{made.free >> 20:,} MiB"
        out.print(f"{made.device}: {free} free; {made.microbatch} examples at a time of {made.asked} asked for")
    if not made.microbatch:
        raise typer.Exit(2)


def _spec(run: Path) -> "Spec":
    """What a client would see of a run file."""
    from fedloom.core.config.run import load_run
    from fedloom.server.build import calibrated

    return calibrated(load_run(run)).spec
