"""`fedloom operate`: how a running coordinator's run stands, and stop; from anywhere, with a certificate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json, times
from fedloom.core.errors import Unavailable

__all__ = ["app", "finish", "status", "stop"]

app = typer.Typer(help="See how a running coordinator's run stands, or stop it.", no_args_is_help=True)

_RESULT = "the adapter lies beside the state on the coordinator's machine, in runs/NAME/adapter"
_ENDED = (
    "a coordinator whose run is over has ended too: `fedloom runs list` on its machine tells whether it is, and the "
    "adapter then lies in runs/NAME/adapter"
)

Server = Annotated[str, typer.Option(help="Address of the coordinator, HOST:PORT.")]
Certs = Annotated[Path, typer.Option(help="Folder that `fedloom certs enrol` wrote for an operator or observer.")]


@app.command()
def status(server: Server, certs: Certs, json_only: Json = False) -> None:
    """Show how the run stands. For operators and observers.

    Example: fedloom operate status --server fl.example.org:8470 --certs operator
    """
    from fedloom.client.transport.admin import status

    try:
        now = status(server, certs)
    except Unavailable as error:
        raise Unavailable(f"{error}; {_ENDED}") from error
    if json_only:
        from google.protobuf.json_format import MessageToDict

        print_json(MessageToDict(now, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("run", now.run)
    table.add_row("opened", times(now.epoch))
    if now.over or now.round >= now.rounds:
        table.add_row("over", f"with {now.round} of {now.rounds} rounds")
        table.add_row("result", _RESULT)
        out.print(table)
        return
    phase = f"open for {now.elapsed_s:.0f} s" if now.open else "not open"
    short = "; the cohort is too small for it" if now.short else ""
    table.add_row("round", f"{now.round + 1} of {now.rounds}, {phase}")
    table.add_row("updates", f"{len(now.submitted)} of {now.needed} needed{short}")
    table.add_row("asked", ", ".join(now.cohort) or "nobody")
    table.add_row("clients", ", ".join(now.live) or "none")
    table.add_row("lost", ", ".join(f"{name} ({now.lost[name]})" for name in sorted(now.lost)) or "none")
    table.add_row("refusing", ", ".join(now.refusing) or "none")
    if now.waiting:
        table.add_row("waiting", f"{now.waiting} (for {now.waiting_s:.0f} s)")
    out.print(table)


@app.command()
def finish(server: Server, certs: Certs) -> None:
    """End the run with the rounds that are committed: clients get the adapter, and no more rounds come. For operators.

    Example: fedloom operate finish --server fl.example.org:8470 --certs operator
    """
    from fedloom.client.transport.admin import finish

    finish(server, certs)
    out.print("the run ends with what is committed")


@app.command()
def stop(server: Server, certs: Certs) -> None:
    """Stop the coordinator cleanly. Started again on the same state directory, the run goes on. For operators.

    Example: fedloom operate stop --server fl.example.org:8470 --certs operator
    """
    from fedloom.client.transport.admin import stop

    stop(server, certs)
    out.print("the coordinator is stopping")
