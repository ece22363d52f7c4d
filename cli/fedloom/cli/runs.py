"""`fedloom runs`: what coordinators keep on this machine."""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import failed, out
from fedloom.proto.errors import StoreError

__all__ = ["app", "listing", "show", "stop", "verify"]

app = typer.Typer(
    help="The state directories of coordinators. `fedloom server` with the same run file takes one up again.",
    no_args_is_help=True,
)

State = Annotated[Path, typer.Argument(help="The state directory of a run, such as runs/NAME/state.")]

_LAST = 10
_PAUSE_S = 0.1


@app.command("list")
def listing(
    folder: Annotated[Path, typer.Argument(help="Folder with the run folders.")] = Path("runs"),
) -> None:
    """List the state directories below a folder: how far each run is, and who works on it.

    Example: fedloom runs list
    """
    from fedloom.server.inspection import holder, look, state_folders

    folders = state_folders(folder)
    if not folders:
        out.print(f"no state directories in {folder}", markup=False)
    for state in folders:
        try:
            snapshot, process = look(state), holder(state)
        except StoreError as error:
            out.print(f"{state}: damaged, {error}", markup=False)
            continue
        run = snapshot.rounds.created.run[:8] if snapshot.rounds.created else "not begun"
        works = f"process {process} works on it" if process else "no coordinator works on it"
        done = f"{snapshot.rounds.round} rounds committed, the next is {snapshot.rounds.phase}"
        out.print(f"{state}: run {run}, {done}; {works}", markup=False)


@app.command()
def show(state: State) -> None:
    """Show where a run stands, what happened in it, and the last lines of its audit log.

    Example: fedloom runs show runs/sentiment/state
    """
    from fedloom.server.inspection import look

    snapshot = look(state)
    rounds = snapshot.rounds
    lines = [
        f"run {rounds.created.run if rounds.created else 'not begun'}, opened {snapshot.epoch} times",
        f"{rounds.round} rounds committed; the next is {rounds.phase}",
    ]
    if rounds.phase == "open":
        lines.append(
            f"asked {len(rounds.cohort)} clients: {len(rounds.updates)} updates accepted, waiting for "
            f"{len(rounds.pending)}, {len(rounds.lost)} lost"
        )
    counts = Counter(type(event).__name__ for event in snapshot.events)
    lines.append("events: " + (", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"))
    noted = Counter(record.kind for record in snapshot.audit)
    lines.append("audit: " + (", ".join(f"{count} {kind}" for kind, count in sorted(noted.items())) or "nothing"))
    lines += [f"  {record.at} {record.kind} {record.client!r} {record.detail!r}" for record in snapshot.audit[-_LAST:]]
    out.print("\n".join(lines), markup=False)


@app.command()
def verify(
    state: State,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", help="A link noted from an earlier `verify`; the log must still contain it."),
    ] = None,
) -> None:
    """Check every record of both logs, that none is missing, and every file the run goes on from; status 1 on trouble.

    The links it prints stand for all records so far. Whoever can write to the directory can forge a whole log, so note
    them elsewhere and give them to a later `verify`.

    Example: fedloom runs verify runs/sentiment/state
    """
    from fedloom.server.inspection import verify as verified

    try:
        snapshot, blobs = verified(state, tuple(heads or ()))
    except StoreError as error:
        failed(error)
        raise typer.Exit(1) from error
    names = ("events", "audit")
    for name, links in zip(names, snapshot.links, strict=True):
        out.print(f"{name}: {len(links)} records, each follows from the one before; head {links[-1] if links else '-'}")
    out.print("a coordinator is at work: its files were not read" if blobs is None else f"{blobs} files: as named")


@app.command()
def stop(
    state: State,
    wait_s: Annotated[float, typer.Option(help="Longest wait for the coordinator to end, in seconds.", min=0)] = 30.0,
) -> None:
    """Stop the coordinator that works on a state directory of this machine; nothing it has acknowledged is lost.

    Example: fedloom runs stop runs/sentiment/state
    """
    from fedloom.server.inspection import holder

    process = holder(state)
    if process is None:
        out.print(f"no coordinator works on {state}", markup=False)
        return
    try:
        os.kill(process, signal.SIGTERM)
    except PermissionError as error:
        raise StoreError(f"process {process} belongs to another user; stop it as that user") from error
    end_s = time.monotonic() + wait_s
    while holder(state) is not None:
        if time.monotonic() > end_s:
            raise StoreError(f"process {process} has not ended within {wait_s:g} s of being told to; look at its log")
        time.sleep(_PAUSE_S)
    out.print(f"stopped; `fedloom server` goes on with {state}", markup=False)
