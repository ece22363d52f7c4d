"""The options by which a run is watched: the dashboard, and what records are sent to."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out
from fedloom.core.config.run import RunConfig
from fedloom.core.registry import load
from fedloom.core.security.address import host_of

if TYPE_CHECKING:
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.monitoring.recorders.background import Scorer
    from fedloom.server.monitoring.status import Observation

__all__ = ["Dashboard", "DashboardTls", "HeldOut", "ReportTo", "Stay", "reports", "scored", "showing"]

ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to", help="Also give every round's record to this recorder; see fedloom components list recorders."
    ),
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--dashboard",
        help="Serve a page, JSON, /metrics and /healthz at HOST:PORT. On a loopback address everybody may look; "
        "elsewhere it takes a token.",
    ),
]
DashboardTls = Annotated[
    Path | None,
    typer.Option("--dashboard-tls", help="PEM file with a key and its certificates; the dashboard is then HTTPS."),
]
Stay = Annotated[bool, typer.Option("--stay", help="Go on serving the dashboard after the run is over, until stopped.")]

HeldOut = Annotated[
    str | None,
    typer.Option(
        "--held-out",
        help="A file, a folder with a test split, or a packaged data set: the adapter is scored on it after every "
        "evaluation.every rounds, by a process of its own, which needs torch and the base model. Never private data.",
    ),
]


def reports(asked: list[str] | None) -> tuple[str, ...]:
    """The recorders that get records.

    Raises:
        ConfigError: One is not installed, or what it needs is not.
    """
    for name in asked or ():
        load("recorders", name)
    return tuple(asked or ())


@contextmanager
def scored(config: RunConfig, source: str | None) -> "Iterator[Scorer | None]":
    """What scores adapters for the length of a `with` block; None without held-out data.

    Raises:
        FedloomError: See `scoring`.
    """
    if source is None:
        yield None
        return
    from fedloom.client.eval.worker import scoring

    with scoring(config, source) as score:
        out.print(f"{source} is scored after every {config.evaluation.every} rounds and the last")
        yield score


@contextmanager
def showing(
    coordinator: "Coordinator",
    observation: "Observation",
    listen: str | None,
    tokens: Path,
    runs: Path | None,
    certs: Path | None,
    tls: Path | None,
) -> Iterator[None]:
    """Serve the dashboard for the length of a `with` block, if it was asked for.

    Args:
        coordinator: Its run.
        observation: Its metrics, and what stops it.
        listen: HOST:PORT; None serves none.
        tokens: Folder where the dashboard's tokens are kept.
        runs: Folder with other runs to show; None for none.
        certs: The coordinator's folder of certificates, to show and for operators to invite and revoke; None for none.
        tls: Key and certificates in one file.

    Raises:
        ConfigError: See `hosting` and `load_tokens`.
    """
    if listen is None:
        yield
        return
    from fedloom.server.monitoring.dashboard.access import LINKS_FILE, load_tokens, write_links
    from fedloom.server.monitoring.dashboard.hosting import hosting
    from fedloom.server.monitoring.dashboard.runs import Board

    host_of(listen)
    shown, _ = load_tokens(tokens)
    with hosting(Board(coordinator, observation, runs, certs), listen, shown, pem=tls) as hosted:
        out.print(f"dashboard at {hosted.url}")
        links = write_links(tokens, hosted.url, shown)
        if sys.stdout.isatty():
            out.print(links, end="")
        out.print(f"  links with a token in {tokens / LINKS_FILE}")
        if not (hosted.open_to_observers or hosted.encrypted):
            out.print("  not encrypted: put a proxy with TLS in front of it, or give --dashboard-tls")
        yield
