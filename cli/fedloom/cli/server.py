"""`fedloom server` and `fedloom prepare`: the coordinator's side of a run."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.certs import SERVER_CERTS
from fedloom.cli.console import INSECURE, out
from fedloom.proto.errors import ConfigError, StoreError
from fedloom.proto.run import RunConfig, load_run
from fedloom.proto.schema import Schema
from fedloom.proto.tables import read_json
from fedloom.server.prepared import prepared_path, with_prepared

if TYPE_CHECKING:
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.store import Store

__all__ = ["derive", "export", "prepare", "server"]

RunFile = Annotated[Path, typer.Argument(help="The run file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as run.rounds=5.")]


def prepare(run: RunFile, overrides: Overrides = None) -> None:
    """Write RUN.schema.json, from which a coordinator without torch can serve the run.

    It holds the adapter's schema and the base model's digest; make it where the base model lies.

    Example: fedloom prepare examples/sentiment.toml
    """
    path = prepared_path(run)
    path.write_text(json.dumps(derive(load_run(run, tuple(overrides or ()))), indent=1) + "\n", encoding="utf-8")
    out.print(f"wrote {path}", markup=False)


def server(
    run: RunFile,
    listen: Annotated[str, typer.Option(help="Address to listen on; port 0 picks a free one.")] = "127.0.0.1:8470",
    state: Annotated[Path | None, typer.Option(help="State directory; runs/NAME/state if not given.")] = None,
    certs: Annotated[Path, typer.Option(help="Folder that `fedloom certs init` made.")] = SERVER_CERTS,
    insecure: Annotated[
        bool, typer.Option("--insecure-loopback", help="No encryption and no certificates; loopback addresses only.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Coordinate a run: wait for clients, run the rounds, keep the adapter. Started again, it goes on.

    Only members whom `fedloom certs invite` has invited are let in.

    Example: fedloom server examples/sentiment.toml --listen 0.0.0.0:8470
    """
    from fedloom.server.serve import serve

    folder, opened = _opened(run, overrides, state)
    if not insecure and not certs.is_dir():
        raise ConfigError(
            f"there are no certificates in {certs}; make them with `fedloom certs init --host NAME`, or, to try things "
            "out on this machine alone, give --insecure-loopback here and to the clients"
        )
    if insecure:
        out.print(INSECURE)
    with opened as (coordinator, store):
        rounds = coordinator.config.run.rounds
        coordinator.on_commit = lambda number, _: out.print(f"round {number}/{rounds} committed")

        def ready(address: str) -> None:
            out.print(f"listening on {address}; state in {folder}", markup=False)

        asyncio.run(serve(coordinator, listen, ready=ready, certs=None if insecure else certs))
        if not coordinator.finished:
            out.print("stopped; start again with the same state directory to go on")
            return
        try:
            out.print(f"run over; adapter in {_save(coordinator, store, folder.parent / 'adapter')}", markup=False)
        except ModuleNotFoundError:
            out.print(
                f"run over; `fedloom export {run} --state {folder}` writes the adapter where torch is", markup=False
            )


def export(
    run: RunFile,
    state: Annotated[Path | None, typer.Option(help="State directory; runs/NAME/state if not given.")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Adapter folder; beside the state if not given.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write the PEFT adapter of a run from its state directory, finished or not; the coordinator must be stopped.

    Give the run file and the overrides that the coordinator was started with.

    Example: fedloom export examples/sentiment.toml --out sentiment-adapter
    """
    folder, opened = _opened(run, overrides, state)
    if not folder.is_dir():
        raise StoreError(f"{folder} does not exist; give the coordinator's state directory with --state")
    with opened as (coordinator, store):
        path = _save(coordinator, store, out_folder or folder.parent / "adapter")
        done = coordinator.state.round
        out.print(f"adapter after {done} of {coordinator.config.run.rounds} rounds in {path}", markup=False)


def _opened(
    run: Path, overrides: list[str] | None, state: Path | None
) -> "tuple[Path, AbstractContextManager[tuple[Coordinator, Store]]]":
    """The state directory of a run, and its coordinator and store to be opened there."""
    from fedloom.server.admission import check_config
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.launch import build_strategy, calibrated
    from fedloom.server.store import Store
    from fedloom.strategies.start import starting_adapter

    config, schema = _with_base(load_run(run, tuple(overrides or ())), run)
    config = calibrated(config)  # takes seconds, so it comes after what may be refused at once
    strategy = build_strategy(config)
    check_config(config, strategy)  # as the coordinator will, but before there is a state directory
    folder = state or Path("runs") / config.run.name / "state"

    @contextmanager
    def opened() -> "Iterator[tuple[Coordinator, Store]]":
        with Store(folder) as store:
            starting = starting_adapter(schema, config.run.seed)
            yield Coordinator(config, schema, strategy, store, starting=starting), store

    return folder, opened()


def _save(coordinator: "Coordinator", store: "Store", folder: Path) -> Path:
    """Write a PEFT adapter; needs the base model and torch."""
    from fedloom.client.export import facts, save_adapter
    from fedloom.client.model import load_model
    from fedloom.proto.accounting import Spend, statement
    from fedloom.server.participation import rounds_asked
    from fedloom.server.user_ledger import statement as user_statement

    config = coordinator.config
    model = load_model(config.model, config.adapter)
    model.load(coordinator.state.adapter)
    privacy, noise = None, config.privacy.noise_multiplier
    if config.privacy.enabled and noise is not None:
        # What the client spent that was asked most often; each client's own ledger knows its own.
        rounds = max(rounds_asked(store.events()).values(), default=0)
        each = Spend(config.train.sampling_rate, noise, config.train.steps)
        privacy = statement([each] * rounds, config.privacy.delta)
    user = user_statement(config.user_level, coordinator.state.round)
    save_adapter(model, folder, {**facts(config, privacy), "user_privacy": user})
    return folder


def _with_base(config: RunConfig, run: Path) -> tuple[RunConfig, Schema]:
    """The run file with the base model pinned, and the schema: from RUN.schema.json, or from the model itself."""
    path = prepared_path(run)
    if path.exists():
        prepared = read_json(path)
    else:
        try:
            prepared = derive(config)
        except ModuleNotFoundError:
            raise ConfigError(
                f"{path} does not exist and torch is not installed here; run `fedloom prepare {run}` where "
                "fedloom[client] is installed and put the file beside the run file"
            ) from None
    return with_prepared(config, prepared, run)


def derive(config: RunConfig) -> dict[str, Any]:
    """What `prepare` writes, from the base model."""
    from fedloom.client.model import base_digest, load_model, resolve_base

    digest = base_digest(resolve_base(config.model.base))
    schema = load_model(config.model, config.adapter).schema
    return {
        "model": config.model.model_dump(mode="json", exclude={"digest"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "digest": digest,
        "schema": json.loads(schema.to_json()),
    }
