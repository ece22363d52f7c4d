"""The one console command and its subcommands."""

import os
import sys
from typing import Annotated

import typer

from fedloom.cli.client import client, data, doctor, identity, ledger, privacy
from fedloom.cli.components import components
from fedloom.cli.console import failed, version
from fedloom.cli.logs import write_logs
from fedloom.cli.server import certs, inspect, merge, push, runs, server
from fedloom.cli.server import operate as operation
from fedloom.cli.simulation import assets, audit, bench, evaluate, flower, init, mean_pool, simulate
from fedloom.core.errors import FedloomError
from fedloom.core.runtime.memory import keep_freed_memory

__all__ = ["app", "main", "options"]

app = typer.Typer(
    name="fedloom",
    help="Fine-tune one model on data that never leaves its owners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, with times, to stderr.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=version)
    ] = False,
) -> None:
    """Options that come before the command's name."""
    write_logs(level="info" if verbose else "warning")
    # Before gRPC loads: it has lines of its own for what becomes an error here, and for every stranger who calls.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR" if verbose else "NONE")


app.command("init")(init.init)
app.command("simulate")(simulate.simulate)
app.command("server")(server.server)
app.command("prepare")(server.prepare)
app.command("export")(server.export)
app.command("push")(push.push)
app.command("evaluate")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.command("client")(client.client)
app.command("doctor")(doctor.doctor)
app.command("identity")(identity.identity)
app.command("audit")(audit.audit)
app.command("assets")(assets.assets)
app.command("mean-pool")(mean_pool.mean_pool)
app.add_typer(components.app, name="components")
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")
app.add_typer(privacy.app, name="privacy")
app.add_typer(runs.app, name="runs")
app.add_typer(certs.app, name="certs")
app.add_typer(operation.app, name="operate")
app.add_typer(bench.app, name="bench")
app.add_typer(flower.app, name="flower")


def main() -> None:
    """Run the command; an error of ours is one line and exit status 2, never a traceback."""
    keep_freed_memory()
    try:
        app()
    except FedloomError as error:
        failed(error)
        sys.exit(2)
    except ModuleNotFoundError as error:
        failed(f"this command needs {error.name!r}, which is not installed; install fedloom[client] or fedloom[server]")
        sys.exit(2)


if __name__ == "__main__":
    main()
