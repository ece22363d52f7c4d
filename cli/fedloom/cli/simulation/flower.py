"""`fedloom flower`: the same run through Flower's SuperLink and SuperNodes."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out
from fedloom.cli.server.server import derive
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import load_run

__all__ = ["app", "export", "node"]

app = typer.Typer(help="Run a run file as a Flower app, on SuperLink and SuperNodes.", no_args_is_help=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of the app; made new.")],
    run: Annotated[Path, typer.Option(help="The run file.")],
    clients: Annotated[
        Path | None,
        typer.Option(help="Also write data and a policy for each made-up client of the run's data section, here."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as run.rounds=5.")] = None,
) -> None:
    """Write a Flower app that `flwr run` takes: the run, its schema, and where fedloom's apps are installed.

    Example: fedloom flower export app --run examples/sentiment.toml
    """
    from fedloom.flower.export import export_app
    from fedloom.server.build import calibrated
    from fedloom.server.prepared_schema import prepared_path, with_prepared

    config = load_run(run, tuple(overrides or ()))
    path = prepared_path(run)
    document = read_json(path) if path.exists() else derive(config)
    config = calibrated(with_prepared(config, document, run)[0])
    export_app(folder, config, document)
    out.print(f"wrote the app {folder}; `flwr run {folder}` runs it")
    if clients is not None:
        from fedloom.simulation.federation import build, write_client

        federation = build(config, clients)
        for name, rows in federation.clients.items():
            policy = write_client(federation.policies[name], rows, clients / name)
            out.print(f"  {name}: {policy}")


@app.command()
def node(
    policy: Annotated[Path, typer.Option(help="The site's policy file.")],
    idle_s: Annotated[float, typer.Option(min=1, help="End after so many seconds without a message.")] = 3600.0,
    parent: Annotated[int | None, typer.Option(help="End when the process with this number is gone.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the policy, such as compute.device=cuda.")
    ] = None,
) -> None:
    """Keep a site's model loaded for Flower, which starts a new process for every message.

    It listens on flower/node.sock in the policy's state folder, for this user alone. A SuperNode starts one by itself
    where none listens; start it by hand to give it a user, a container or a service of its own.

    Example: fedloom flower node --policy client.toml
    """
    from fedloom.client.policy import load_policy

    logging.getLogger("fedloom").setLevel(logging.INFO)
    site = load_policy(policy, tuple(overrides or ()))
    from fedloom.flower.resident_process import run

    if not run(site, idle_s, parent):
        out.print(f"{site.client.name}: another process listens already; this one is not needed")
