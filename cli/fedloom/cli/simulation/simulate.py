"""`fedloom simulate`: a whole federation on this machine."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import out, show_classes, size, terms, told
from fedloom.cli.server.observing import ReportTo, reports
from fedloom.core.codecs import codec
from fedloom.core.codecs.auto import chosen
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.privacy.spends import faint
from fedloom.simulation.virtual_time.assignments import ASSIGNMENTS_FILE

if TYPE_CHECKING:
    from fedloom.server.monitoring.recorders.api import RoundRecord
    from fedloom.simulation.federation import Federation
    from fedloom.simulation.simulate import Result

__all__ = ["simulate"]

_OF_CLIPPED = 0.5
"""Rates from here on are of gradients that are clipped to a norm of one or less."""


def simulate(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    engine: Annotated[
        Literal["inprocess", "grpc", "ray"] | None,
        typer.Option(
            help="inprocess: one process. grpc: a coordinator and a process per client, on loopback. ray: an actor of "
            "Ray per GPU or CPU, here or on a cluster of your own."
        ),
    ] = None,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train without differential privacy, for comparison.")
    ] = False,
    out_folder: Annotated[Path, typer.Option("--out", help="Parent of the run folder.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as train.learning_rate=0.5.")
    ] = None,
    report_to: ReportTo = None,
    probe: Annotated[
        list[float] | None,
        typer.Option(
            "--probe",
            metavar="RATE",
            help="Then train the head alone with the same privacy at this learning rate, and show both; of several, "
            "the best.",
        ),
    ] = None,
) -> None:
    """Run a federation on this machine and leave a PEFT adapter in runs/NAME/adapter.

    Example: fedloom simulate examples/sentiment.toml --set run.rounds=3
    """
    chosen = list(overrides or ())
    chosen += [f"engine.kind={engine}"] if engine else []
    chosen += ["privacy.enabled=false"] if no_privacy else []
    config = load_run(run, tuple(chosen))
    if no_privacy:
        config = _open(config, chosen)
    # Loads torch, which takes seconds: a mistake in the run file should not have to wait for it.
    from fedloom.simulation.probe import probe_of
    from fedloom.simulation.progress_bar import progress_bar
    from fedloom.simulation.simulate import Watcher
    from fedloom.simulation.simulate import simulate as run_simulation

    probes = [probe_of(config, rate) for rate in probe or ()]
    with progress_bar(out) as moved:
        watcher = Watcher(ready=_introduce, moved=moved, recorded=lambda record: _line(config, record))
        result = run_simulation(config, out_folder, watcher, report_to=reports(report_to))
    _summary(config, result)
    if probes:
        with progress_bar(out) as moved:
            frozen = [run_simulation(each, out_folder, Watcher(moved=moved)) for each in probes]
        _beside(config, result, max(frozen, key=lambda each: each.final.accuracy))


def _open(config: RunConfig, chosen: list[str]) -> RunConfig:
    """A run without privacy under a name that says so; what its rates were chosen for is told."""
    if config.train.learning_rate >= _OF_CLIPPED and not any(each.startswith("train.") for each in chosen):
        out.print(
            f"note: train.learning_rate = {config.train.learning_rate:g} was chosen for clipped gradients, and without "
            "privacy nothing is clipped; for a fair comparison add --set train.optimizer=adam "
            "--set train.learning_rate=0.002 --set train.head_learning_rate=0.002"
        )
    name = f"{config.run.name}-no-privacy"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _lost(config: RunConfig, name: str) -> str:
    """What the codec of updates takes from them; empty for one that takes nothing, and where sums have their own."""
    error = codec(name).traits.mean_error
    if not error or config.secure_aggregation.enabled:
        return ""
    more = f", as {100 * ((1 + error) ** 0.5 - 1):.2g}% more noise would" if config.privacy.enabled else ""
    return f"what is lost has {100 * error:.2g}% of their squared length{more}"


def _introduce(federation: "Federation", folder: Path) -> None:
    """Say what is about to run, before it takes minutes."""
    config, schema = federation.config, federation.model.schema
    engine, device = config.engine.kind, federation.model.device.type
    place = engine if device == "cpu" else f"{engine} on {device}"
    out.print(
        f"[bold]{folder.name}[/]: {config.strategy.name}, {len(federation.clients)} clients, {place}", markup=True
    )
    trained = f"{config.adapter.kind}, head {config.model.head}"
    if modules := federation.model.head.modules:
        trained += f": {'new' if federation.model.head.new else 'from the checkpoint'} {', '.join(modules)}"
    out.print(f"  base {config.model.base}; adapter of {schema.size:,} values ({trained})")
    for name, rows in federation.clients.items():
        groups = ", ".join(sorted(set(rows.groups) - {""}))
        out.print(f"  {name}: {len(rows):,} examples {groups}")
    privacy = config.privacy
    if privacy.enabled:
        out.print(
            f"  private: epsilon {privacy.epsilon:g}, delta {privacy.delta:g} for each example over the whole run; "
            f"noise multiplier {privacy.noise_multiplier:.3f}, rate {config.train.sampling_rate:g}, "
            f"{config.train.steps * config.run.rounds} steps"
            + (f", noise over {privacy.noise_bands} bands" if privacy.noise_bands > 1 else "")
            + (", automatic clipping" if privacy.clipping == "automatic" else "")
        )
    else:
        out.print("  [yellow]not private[/]: updates leave the clients without noise", markup=True)
    name = chosen(config.wire.upload, schema)
    if lost := _lost(config, name):
        out.print(f"  updates in {name}: {lost}")
    for name, policy in federation.policies.items():
        if (drowned := faint(config.spec, policy.data.declared_examples or 0)) is not None:
            out.print(f"  [yellow]{name}[/]: {drowned}", markup=True)
    user = config.user_level
    if user.enabled:
        out.print(
            f"  user-level: epsilon {user.epsilon:g}, delta {user.delta:g} for each whole client against all but the "
            f"coordinator; {user.mechanism} noise multiplier {user.noise_multiplier:.3f}, cohort {user.cohort}"
        )


_IN_A_LINE = 2
"""Most of a task's own figures that are told after every round; more are told in the end."""


def _line(config: RunConfig, record: "RoundRecord") -> None:
    """One line per round."""
    label = f"round {record.round:>3}/{config.run.rounds}" if record.round else "start    "
    score = f"accuracy {record.accuracy:.1%}  loss {record.loss:.3f}" if record.accuracy is not None else ""
    figures = record.metrics or {}
    if len(figures) <= _IN_A_LINE:
        score += "".join(f"  {name} {value:.4g}" for name, value in figures.items())
    if record.federated:
        score += f"  begun at {told(record.federated)} by the clients"
    spent = f"  epsilon {_range(record.epsilon.values())}" if record.epsilon else ""
    spent += f"  user-level {record.user_epsilon:.2f}" if record.user_epsilon is not None else ""
    traffic = f"  {record.clients} clients  up {size(record.bytes_up)}  down {size(record.bytes_down)}"
    time = f"{record.seconds:.0f} s"
    time += f"  virtual {record.virtual_seconds:,.0f} s" if record.virtual_seconds is not None else ""
    out.print(f"{label}  {score}{spent}{traffic if record.round else ''}  {time}")


def _range(epsilons: Collection[float]) -> str:
    """What the clients have spent: one figure, or the least and the most where they differ."""
    least, most = f"{min(epsilons):.2f}", f"{max(epsilons):.2f}"
    return most if least == most else f"{least} to {most}"


def _summary(config: RunConfig, result: "Result") -> None:
    """The closing table and where everything is."""
    table = Table("", "start", "end", box=None, pad_edge=False)
    if result.told is not None:
        table.add_row("by the clients, on their rows", "", Text(told(result.told), "bold"))
    table.add_row("held-out accuracy", f"{result.start.accuracy:.1%}", Text(f"{result.final.accuracy:.1%}", "bold"))
    table.add_row("held-out loss", f"{result.start.loss:.3f}", f"{result.final.loss:.3f}")
    for name, value in result.final.metrics.items():
        before = result.start.metrics.get(name)  # some have no value where all answers are one class
        table.add_row(f"held-out {name}", "" if before is None else f"{before:.4g}", f"{value:.4g}")
    for name, cost in _costs(config, result):
        table.add_row(name, "", cost)
    for name, stated in result.privacy.items():
        joined = f"{stated.rounds} of {config.run.rounds} rounds joined"
        table.add_row(f"epsilon of {name}", "0", f"{stated.epsilon:.3f} at delta {stated.delta:g}, {joined}")
    if result.user_epsilon is not None:
        table.add_row("user-level epsilon", "0", f"{result.user_epsilon:.3f} at delta {config.user_level.delta:g}")
    out.print()
    out.print(table)
    show_classes(result.final.confusion, config.model.labels)
    if result.privacy:
        out.print(f"\n{terms(max(result.privacy.values(), key=lambda each: each.epsilon))}")
    merged, own = result.exported.name == "merged", (result.exported / "adapter.json").is_file()
    reader = "the model's own from_pretrained" if merged else "PeftModel.from_pretrained"
    reader = "fedloom.api.load_adapter" if own else reader
    out.print(f"\n{'model  ' if merged else 'adapter'}  {result.exported}")
    out.print(f"         reloaded with {reader}: {result.agreement:.1%} of predictions the same")
    for each in (result.folder / name for name in ("adapters", "merged-by-client")):
        if each.is_dir():
            out.print(
                f"         {each} has one for each client, with what it kept to itself; the accuracy is their mean"
            )
    out.print(f"metrics  {result.folder / 'metrics.jsonl'}")
    out.print(f"plot     {result.folder / 'curves.png'}")
    if result.records[-1].virtual_seconds is not None:
        out.print(f"clients  {result.folder / ASSIGNMENTS_FILE}")


def _costs(config: RunConfig, result: "Result") -> Iterator[tuple[str, str]]:
    """What the run took, by name."""
    last = result.records[-1]
    up, down = (sum(getattr(r, key) for r in result.records) for key in ("bytes_up", "bytes_down"))
    yield "sent by all clients", f"{size(up)} up, {size(down)} down"
    yield "time", f"{last.seconds:.0f} s, {result.cpu_seconds:.0f} s of processor time in all"
    if result.peak_bytes is not None:
        alone = "" if config.engine.kind == "inprocess" else ", of this process alone"
        yield "peak memory", f"{result.peak_bytes / 2**20:,.0f} MiB{alone}"
    if last.virtual_seconds is not None:
        yield "virtual time", f"{last.virtual_seconds:,.0f} s"


def _beside(config: RunConfig, adapter: "Result", probe: "Result") -> None:
    """What adapting the base model has gained over a linear classifier on what it gives as it is."""
    from fedloom.client.eval.confusion import classes_document

    table = Table("held-out", "accuracy", "mean F1", "loss", "epsilon", box=None, pad_edge=False)
    found = {f"adapter ({config.adapter.kind})": adapter, "probe (frozen features)": probe}
    for name, result in found.items():
        mean = classes_document(result.final.confusion, config.model.labels)["macro_f1"]
        spent = f"{max(result.epsilon.values()):.2f}" if result.epsilon else "no privacy"
        score = (f"{result.final.accuracy:.1%}", "-" if mean is None else f"{mean:.1%}", f"{result.final.loss:.3f}")
        table.add_row(name, *score, spent)
    out.print()
    out.print(table)
    gained = 100 * (adapter.final.accuracy - probe.final.accuracy)
    out.print(
        f"the adapter is {abs(gained):.1f} points {'better' if gained >= 0 else 'worse'}; probe in {probe.folder}"
    )
