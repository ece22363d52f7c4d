"""`fedloom server` and `fedloom prepare`: the coordinator's side of a run."""

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedloom.cli.console import INSECURE, Json, out, pace, print_json, told
from fedloom.cli.logs import LogFormat, LogLevel, write_logs
from fedloom.cli.server.certs import SERVER_CERTS
from fedloom.cli.server.observing import Dashboard, DashboardTls, HeldOut, ReportTo, Stay, reports, scored, showing
from fedloom.core.config.parsing import read_json
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.config.start import needs_base, pinned
from fedloom.core.errors import ConfigError, StoreError
from fedloom.core.model_card import held_out_facts
from fedloom.core.runtime.durable import write_durably
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.core.tensor_file import TENSORS, tensor_file
from fedloom.server.prepared_schema import prepared_path, with_prepared
from fedloom.strategies.start import stored_start

if TYPE_CHECKING:
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.monitoring.status import Observation
    from fedloom.server.storage.local import Store
    from fedloom.strategies.api import State

__all__ = ["derive", "export", "prepare", "server"]

Format = Literal["peft", "merged", "fedloom", "safetensors", "onnx", "gguf"]
_TARGETS: dict[Format, str] = {
    "peft": "adapter",
    "merged": "merged",
    "fedloom": "adapter",
    "safetensors": TENSORS,
    "onnx": "onnx",
    "gguf": "gguf",
}
"""What an export is called beside the state directory."""
_WHAT: dict[Format, str] = {
    "peft": "adapter",
    "merged": "merged model",
    "fedloom": "adapter",
    "safetensors": "adapter",
    "onnx": "ONNX graph",
    "gguf": "GGUF file",
}

RunFile = Annotated[Path, typer.Argument(help="The run file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as run.rounds=5.")]


def prepare(run: RunFile, overrides: Overrides = None) -> None:
    """Write RUN.schema.json, from which a coordinator without torch can serve the run.

    It holds the adapter's schema and the base model's digest; make it where the base model lies. The digest is printed
    too: a run pins it as model.digest, a site's policy lists it in model.digests.

    Example: fedloom prepare examples/sentiment.toml
    """
    path = prepared_path(run)
    config = load_run(run, tuple(overrides or ()))
    document = derive(config)
    try:
        # whole or not at all: a coordinator may be waiting for it
        write_durably(path, json.dumps(document, indent=1).encode(), b"\n")
        path.chmod(0o644)  # nothing in it is secret, and the coordinator may be another user
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    out.print(f"wrote {path}")
    out.print(f"base model {document['digest']}")
    if needs_base(config.start):
        pinned, schema = with_prepared(config, document, run)
        values = _starting(pinned, schema)
        target = path.with_suffix("").with_suffix(".start.safetensors")
        _write_tensors(target, values, schema, {"base_digest": document["digest"], "labels": list(config.model.labels)})
        out.print(f"wrote {target}; a coordinator without torch begins there: --set start.adapter={target}")


def server(
    run: RunFile,
    listen: Annotated[str, typer.Option(help="Address to listen on; port 0 picks a free one.")] = "127.0.0.1:8470",
    state: Annotated[Path | None, typer.Option(help="State directory; runs/NAME/state if not given.")] = None,
    certs: Annotated[Path, typer.Option(help="Folder that `fedloom certs init` made.")] = SERVER_CERTS,
    insecure: Annotated[
        bool, typer.Option("--insecure-loopback", help="No encryption and no certificates; loopback addresses only.")
    ] = False,
    dashboard: Dashboard = None,
    dashboard_tls: DashboardTls = None,
    stay: Stay = False,
    report_to: ReportTo = None,
    held_out: HeldOut = None,
    log_format: LogFormat = "text",
    log_level: LogLevel = None,
    overrides: Overrides = None,
) -> None:
    """Coordinate a run: wait for clients, run the rounds, keep the adapter. Started again, it goes on.

    Only members whom `fedloom certs invite` has invited are let in. Every round leaves a line in metrics.jsonl beside
    the state directory.

    Example: fedloom server examples/sentiment.toml --listen 0.0.0.0:8470 --dashboard 127.0.0.1:8480
    """
    from fedloom.server.monitoring.recorders.api import write_config
    from fedloom.server.monitoring.status import observing
    from fedloom.server.rpc.server import serve

    write_logs(log_format, log_level)
    programs = reports(report_to)
    if stay and dashboard is None:
        raise ConfigError("--stay keeps the dashboard open after the run; give --dashboard HOST:PORT too")

    folder, config, opened = _opened(run, overrides, state)
    if not insecure and not certs.is_dir():
        raise ConfigError(
            f"there are no certificates in {certs}; make them with `fedloom certs init --host NAME`, or, to try things "
            "out on this machine alone, give --insecure-loopback here and to the clients"
        )
    if insecure:
        out.print(INSECURE)
    with (
        scored(config, held_out) as score,
        opened as (coordinator, store),
        observing(coordinator, store, folder.parent, programs, score) as observation,
    ):
        rounds = config.run.rounds
        rest = pace(rounds)

        def committed(number: int, reached: "State") -> None:
            observation.committed(number, reached)
            out.print(f"round {number}/{rounds} committed{rest(number)}")

        coordinator.on_commit = committed
        coordinator.say = out.print
        if state is None:  # runs/NAME is ours; elsewhere a run.toml may be somebody's own
            write_config(folder.parent, config)

        others = None if state else folder.parent.parent
        tokens, members = (folder, None) if insecure else (certs, certs)
        with showing(coordinator, observation, dashboard, tokens, others, members, dashboard_tls):
            serving = serve(
                coordinator,
                listen,
                ready=lambda address: _ready(coordinator, folder, address),
                certs=None if insecure else certs,
                observation=observation,
            )
            asyncio.run(serving)
            if not coordinator.finished:
                out.print("stopped; start again with the same state directory to go on")
                return
            if coordinator.told is not None:
                out.print(f"the result, by the clients on their rows: {told(coordinator.told)}")
            try:
                usual = _usual(config)
                saved = _save(coordinator, store, folder.parent / _TARGETS[usual], usual)
                out.print(f"run over; {_WHAT[usual]} in {saved}")
            except ModuleNotFoundError:
                out.print(f"run over; `fedloom export {run} --state {folder}` writes the adapter where torch is")
            if stay:
                out.print("the dashboard stays until it is stopped")
                _until_told(observation)


def _ready(coordinator: "Coordinator", folder: Path, address: str) -> None:
    """Say where the coordinator is, and whether there is anything left to do."""
    now = coordinator.progress
    if now.over:
        out.print(f"this run is over, with {now.round} of {now.rounds} rounds; state in {folder}")
        out.print(f"clients of its last round may fetch the adapter at {address} for a moment, then this ends")
    else:
        out.print(f"listening on {address}; state in {folder}")


def _until_told(observation: "Observation") -> None:
    """Wait for SIGTERM, SIGINT or an operator."""
    told = threading.Event()
    observation.stop = told.set
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: told.set())
    told.wait()


def export(
    run: RunFile,
    state: Annotated[Path | None, typer.Option(help="State directory; runs/NAME/state if not given.")] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder, or file for safetensors; beside the state if not given.")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="peft, merged, fedloom, safetensors, onnx or gguf; if not given, what the run itself would leave."
        ),
    ] = None,
    weights: Annotated[
        Literal["f32", "f16"], typer.Option(help="Bits of a GGUF file's matrices: f32 is exact, f16 half as large.")
    ] = "f32",
    overrides: Overrides = None,
    json_only: Json = False,
) -> None:
    """Write the result of a run from its state directory, finished or not; the coordinator must be stopped.

    peft is an adapter for the base model, merged a whole model with the adapter folded into its weights, fedloom a
    folder for fedloom.api.load_adapter, of kinds that have neither, and safetensors one file of the adapter's tensors,
    which needs neither torch nor the base model. onnx is a whole model that classifies, for onnxruntime, and gguf a
    whole language model of the Llama kind with its adapter, for llama.cpp.
    Give the run file and the overrides that the coordinator was started with.

    Example: fedloom export examples/sentiment.toml --format merged --out sentiment-model
    """
    folder, _, opened = _opened(run, overrides, state)
    if not folder.is_dir():
        raise StoreError(f"{folder} does not exist; give the coordinator's state directory with --state")
    with opened as (coordinator, store):
        format = format or _usual(coordinator.config)
        held_out = _held_out(folder.parent, coordinator.state.round)
        path = _save(coordinator, store, out_folder or folder.parent / _TARGETS[format], format, held_out, weights)
        done, rounds = coordinator.state.round, coordinator.config.run.rounds
    if json_only:
        print_json({"path": str(path), "format": format, "rounds": done, "of": rounds})
        return
    out.print(f"{_WHAT[format]} after {done} of {rounds} rounds in {path}")


def _opened(
    run: Path, overrides: list[str] | None, state: Path | None
) -> "tuple[Path, RunConfig, AbstractContextManager[tuple[Coordinator, Store]]]":
    """The state directory of a run, its completed run file, and its coordinator and store to be opened there."""
    from fedloom.server.build import build_strategy, calibrated
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.storage.local import Store
    from fedloom.server.validate_config import check_config

    config, schema = _with_base(load_run(run, tuple(overrides or ())), run)
    config = config.model_copy(update={"start": pinned(config.start)})
    config = calibrated(config)  # takes seconds, so it comes after what may be refused at once
    strategy = build_strategy(config)
    check_config(config, strategy)  # as the coordinator will, but before there is a state directory
    folder = state or Path("runs") / config.run.name / "state"

    @contextmanager
    def opened() -> "Iterator[tuple[Coordinator, Store]]":
        with Store(folder) as store:
            # A run that goes on has its adapter, and may have outlived the one it began from.
            starting = {} if config.start is not None and store.events() else _starting(config, schema)
            yield Coordinator(config, schema, strategy, store, starting=starting), store

    return folder, config, opened()


def _starting(config: RunConfig, schema: Schema) -> dict[str, Array]:
    """The adapter that a run begins from; a PEFT adapter's folder is read with torch and the base model."""
    if needs_base(config.start):
        with suppress(ModuleNotFoundError):  # what comes below then says what to do
            from fedloom.client.models.load import load_model
            from fedloom.client.models.start import start_of

            return start_of(config, load_model(config.model, config.adapter))
    return stored_start(config, schema)


def _usual(config: RunConfig) -> Format:
    """What a run gives if nothing else is asked for."""
    from fedloom.client.adapters.attach import adapter_of

    return adapter_of(config.adapter).traits.result


def _held_out(folder: Path, number: int) -> dict[str, Any]:
    """What the coordinator has measured on held-out rows after a round, by its metrics.jsonl; nothing if it has not."""
    from fedloom.server.monitoring.recorders.api import METRICS_FILE, read_metrics

    records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    found = next((each for each in reversed(records) if each.round == number and each.accuracy is not None), None)
    return {} if found is None else held_out_facts(found.accuracy, found.loss, found.metrics)


def _save(
    coordinator: "Coordinator",
    store: "Store",
    target: Path,
    format: Format,
    held_out: dict[str, Any] | None = None,
    weights: Literal["f32", "f16"] = "f32",
) -> Path:
    """Write the result; all but safetensors need the base model and torch."""
    from fedloom.core.privacy.spends import run_statement
    from fedloom.server.monitoring.participation import rounds_asked
    from fedloom.server.privacy.user_ledger import statement as user_statement

    config = coordinator.config
    privacy = None
    if config.privacy.enabled:
        # What the client spent that was asked most often; each client's own ledger knows its own.
        rounds = max(rounds_asked(store.events()).values(), default=0)
        privacy = run_statement(config, rounds)
    user = user_statement(config.user_level, coordinator.state.round)
    if format == "safetensors":
        terms = {"privacy": privacy.document() if privacy else None, "user_privacy": user}
        about = {"base_digest": config.model.digest, "labels": list(config.model.labels)}
        known = {"run": config.run.name, **about, "rounds": coordinator.state.round, **terms, **(held_out or {})}
        return _save_tensors(coordinator, target, known)
    from fedloom.client.models.exports.adapter_folder import save_folder
    from fedloom.client.models.exports.facts import facts
    from fedloom.client.models.exports.gguf_files import save_gguf
    from fedloom.client.models.exports.merged_model import save_merged
    from fedloom.client.models.exports.onnx_graph import save_onnx
    from fedloom.client.models.exports.peft_adapter import save_adapter
    from fedloom.client.models.load import load_model

    model = load_model(config.model, config.adapter)
    model.show(coordinator.result())
    known = {**facts(config, privacy, user), **(held_out or {})}
    saves: dict[Format, Callable[..., None]] = {
        "peft": save_adapter,
        "merged": save_merged,
        "fedloom": save_folder,
        "onnx": save_onnx,
        "gguf": partial(save_gguf, weights=weights),
    }
    saves[format](model, target, known)
    return target


def _save_tensors(coordinator: "Coordinator", target: Path, known: dict[str, Any]) -> Path:
    """Write the adapter's tensors by their schema's names, with the schema and what is known of them."""
    from fedloom.strategies.result import result_schema

    model = coordinator.result()
    _write_tensors(target, model, result_schema(coordinator.state.schema, model), known)
    return target


def _write_tensors(path: Path, tensors: Tensors, schema: Schema, known: dict[str, Any]) -> None:
    """Write tensors by their schema's names, with the schema and what is known of them.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        write_durably(path, tensor_file(tensors, schema, known))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; give a file in a folder that exists") from error


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
    from fedloom.client.models.base_folder import base_digest, resolve_base
    from fedloom.client.models.load import load_model

    digest = base_digest(resolve_base(config.model.base))
    schema = load_model(config.model, config.adapter).schema
    return {
        "model": config.model.model_dump(mode="json", exclude={"digest"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "digest": digest,
        "schema": json.loads(schema.to_json()),
    }
