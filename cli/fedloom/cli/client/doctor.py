"""`fedloom doctor`: what would keep a site from taking part, before it tries."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out

if TYPE_CHECKING:
    from fedloom.core.config.run import Spec

__all__ = ["doctor"]

_MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    policy: Annotated[Path, typer.Argument(help="This site's policy file.")],
    server: Annotated[
        str | None, typer.Option(help="Address of the coordinator, HOST:PORT; without it the network is left out.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run file, to look at its policy, budget, rows, layers and sensitivity as well.")
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


def _spec(run: Path) -> "Spec":
    """What a client would see of a run file."""
    from fedloom.core.config.run import load_run
    from fedloom.server.build import calibrated

    return calibrated(load_run(run)).spec
