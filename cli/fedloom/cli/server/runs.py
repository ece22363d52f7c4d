"""`fedloom runs`: what coordinators and simulations keep on this machine."""

import os
import shlex
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.console import Json, failed, out, print_json, times, told
from fedloom.cli.server.compare import compare
from fedloom.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from fedloom.server.storage.verify import Snapshot

__all__ = ["app", "listing", "resume", "show", "stop", "verify"]

app = typer.Typer(
    help="Runs on this machine: where they stand, whether they are what was written, and how to go on.",
    no_args_is_help=True,
)
app.command("compare")(compare)

State = Annotated[Path, typer.Argument(help="The state directory of a run, such as runs/NAME/state.")]

_LAST = 10
_PAUSE_S = 0.1


@app.command("list")
def listing(
    folder: Annotated[Path, typer.Argument(help="Folder with the run folders.")] = Path("runs"),
    json_only: Json = False,
) -> None:
    """List the state directories below a folder: how far each run is, and who works on it.

    Example: fedloom runs list
    """
    from fedloom.server.storage.verify import holder, look, state_folders

    rows: list[dict[str, Any]] = []
    lines = []
    for state in state_folders(folder):
        try:
            snapshot, process = look(state), holder(state)
        except StoreError as error:
            rows.append({"state": str(state), "damaged": str(error)})
            lines.append(f"{state}: damaged, {error}")
            continue
        rows.append({"state": str(state), "process": process, **_standing(snapshot)})
        run = snapshot.rounds.created.run[:8] if snapshot.rounds.created else "not begun"
        works = f"process {process} works on it" if process else "no coordinator works on it"
        done = _done(state, snapshot)
        lines.append(f"{state}: run {run}, {done}; {works}")
    if json_only:
        print_json(rows)
    else:
        out.print("\n".join(lines) or f"no state directories in {folder}")


@app.command()
def show(state: State, json_only: Json = False) -> None:
    """Show where a run stands, what happened in it, and the last lines of its audit log.

    Example: fedloom runs show runs/sentiment/state
    """
    from fedloom.server.storage.verify import look

    snapshot = look(state)
    rounds = snapshot.rounds
    counts = Counter(type(event).__name__ for event in snapshot.events)
    noted = Counter(record.kind for record in snapshot.audit)
    if json_only:
        last = [asdict(record) for record in snapshot.audit[-_LAST:]]
        counted = {"opened": snapshot.epoch, "events": dict(counts), "audit": dict(noted), "last_audit": last}
        number, score = _told(state, snapshot)
        scored = {"federated": score, "federated_after": number}
        print_json({"state": str(state), **_standing(snapshot), **scored, **counted})
        return
    lines = [
        f"run {rounds.created.run if rounds.created else 'not begun'}, opened {times(snapshot.epoch)}",
        _done(state, snapshot),
    ]
    if rounds.phase == "open":
        lines.append(
            f"asked {len(rounds.cohort)} clients: {len(rounds.updates)} updates accepted, waiting for "
            f"{len(rounds.pending)}, {len(rounds.lost)} lost"
        )
    lines += _took_part(snapshot)
    number, score = _told(state, snapshot)
    if score:
        lines.append(f"by the clients, after {number} rounds: {told(score)}")
    lines.append("events: " + (", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"))
    lines.append("audit: " + (", ".join(f"{count} {kind}" for kind, count in sorted(noted.items())) or "nothing"))
    lines += [f"  {record.at} {record.kind} {record.client!r} {record.detail!r}" for record in snapshot.audit[-_LAST:]]
    out.print("\n".join(lines))


@app.command()
def verify(
    state: State,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", help="A link noted from an earlier `verify`; the log must still contain it."),
    ] = None,
    json_only: Json = False,
) -> None:
    """Check every record of both logs, that none is missing, and every file the run goes on from; status 1 on trouble.

    The links it prints stand for all records so far. Whoever can write to the directory can forge a whole log, so note
    them elsewhere and give them to a later `verify`.

    Example: fedloom runs verify runs/sentiment/state
    """
    from fedloom.server.storage.verify import verify as verified

    try:
        snapshot, blobs = verified(state, tuple(heads or ()))
    except StoreError as error:
        if json_only:
            print_json({"state": str(state), "trouble": str(error)})
        else:
            failed(error)
        raise typer.Exit(1) from error
    logs = dict(zip(("events", "audit"), snapshot.links, strict=True))
    if json_only:
        counted = {name: {"records": len(links), "head": next(iter(links[-1:]), None)} for name, links in logs.items()}
        print_json({"state": str(state), "trouble": None, **counted, "files": blobs})
        return
    for name, links in logs.items():
        out.print(f"{name}: {len(links)} records, each follows from the one before; head {links[-1] if links else '-'}")
    out.print("a coordinator is at work: its files were not read" if blobs is None else f"{blobs} files: as named")


@app.command()
def resume(
    state: State,
    run: Annotated[Path, typer.Argument(help="The run file that it was started with.")],
) -> None:
    """Check that a stopped run can go on, and print the command with which it does.

    Going on is what `fedloom server` does by itself with the state directory of a stopped run; a machine's own service
    manager therefore needs no more than to start it again. Give it the options that it had, --listen and --certs above
    all: they are not kept.

    Example: fedloom runs resume runs/sentiment/state examples/sentiment.toml
    """
    from fedloom.core.config.run import load_run
    from fedloom.server.storage.verify import holder
    from fedloom.server.storage.verify import verify as verified

    config = load_run(run)
    process = holder(state)
    if process is not None:
        raise StoreError(f"process {process} works on {state}; there is nothing to resume")
    done = verified(state)[0].rounds.round
    if done >= config.run.rounds:
        raise StoreError(
            f"all {done} rounds of {state} are committed; `fedloom export {run} --state {state}` writes its adapter"
        )
    out.print(f"{state} is what was written; {done} of {config.run.rounds} rounds are committed")
    out.print(f"fedloom server {shlex.quote(str(run))} --state {shlex.quote(str(state))}")


@app.command()
def stop(
    state: State,
    wait_s: Annotated[float, typer.Option(help="Longest wait for the coordinator to end, in seconds.", min=0)] = 30.0,
) -> None:
    """Stop the coordinator that works on a state directory of this machine; nothing it has acknowledged is lost.

    Example: fedloom runs stop runs/sentiment/state
    """
    from fedloom.server.storage.verify import holder

    process = holder(state)
    if process is None:
        out.print(f"no coordinator works on {state}")
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
    out.print(f"stopped; `fedloom server` goes on with {state}")


def _done(state: Path, snapshot: "Snapshot") -> str:
    """How far a run is, for people."""
    rounds, length = snapshot.rounds, _length(state)
    done = f"{rounds.round}{f' of {length}' if length else ''} rounds committed"
    if rounds.phase == "over":
        return f"{done}; the run was ended with them"
    if length is not None and rounds.round >= length:
        return f"{done}; the run is over"
    return f"{done}; {'no round is open' if rounds.phase == 'idle' else f'round {rounds.round + 1} is {rounds.phase}'}"


def _length(state: Path) -> int | None:
    """Rounds of the whole run, where its run file lies beside the state."""
    from fedloom.core.config.run import load_run

    with suppress(ConfigError):
        return load_run(state.absolute().parent / "run.toml").run.rounds
    return None


def _told(state: Path, snapshot: "Snapshot") -> "tuple[int | None, dict[str, float | None] | None]":
    """After how many rounds the clients scored the adapter last, and what they said; None where they said nothing."""
    from fedloom.core.config.run import load_run
    from fedloom.server.monitoring.recorders.api import read_metrics
    from fedloom.server.rounds.evaluation import federated_score

    if scores := snapshot.rounds.scored:
        with suppress(ConfigError):
            spec = load_run(state.absolute().parent / "run.toml").spec
            return snapshot.rounds.round, federated_score(spec, scores.values())
    with suppress(OSError):
        for record in reversed(read_metrics(state.absolute().parent)):
            if record.federated:
                return record.round - 1, record.federated  # a round scores the adapter that it starts from
    return None, None


def _took_part(snapshot: "Snapshot") -> list[str]:
    """Whose updates were taken how often, and who refuses."""
    from fedloom.server.rounds.state import RoundClosed

    taken = Counter(client for event in snapshot.events if isinstance(event, RoundClosed) for client in event.clients)
    last = {record.client: record.kind for record in snapshot.audit if record.kind in ("joined", "declined")}
    refusing = sorted(client for client, kind in last.items() if kind == "declined")
    lines = ["took part: " + (", ".join(f"{client} in {taken[client]} rounds" for client in sorted(taken)) or "nobody")]
    if refusing:
        lines.append(f"refused to take part: {', '.join(refusing)}; their own logs say why")
    return lines


def _standing(snapshot: "Snapshot") -> dict[str, Any]:
    """Where a run stands, for programs."""
    rounds = snapshot.rounds
    standing: dict[str, Any] = {
        "run": rounds.created.run if rounds.created else None,
        "rounds_committed": rounds.round,
        "next": rounds.phase,
    }
    if rounds.phase == "open":
        standing |= {
            "asked": sorted(rounds.cohort),
            "accepted": sorted(rounds.updates),
            "waiting_for": sorted(rounds.pending),
            "lost": dict(rounds.lost),
        }
    return standing
