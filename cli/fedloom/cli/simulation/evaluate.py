"""`fedloom evaluate`: what an adapter makes of held-out rows that lie here."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import Json, out, print_json, show_classes
from fedloom.core.config.run import load_run, task_traits
from fedloom.core.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from fedloom.client.eval.score import Score

__all__ = ["evaluate"]

_SHOWN = 3
"""Texts that the model wrote, for a first look."""


def evaluate(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a PEFT adapter or a merged model that a run left.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="A coordinator's state directory, whose newest committed adapter is scored, also while it works; "
            "runs/NAME/state if neither is given."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A file, a folder or a packaged data set; data.source of the run file if not given."),
    ] = None,
    split: Annotated[
        Literal["train", "test"], typer.Option(help="Part of the data set. A file named by --data is scored whole.")
    ] = "test",
    max_examples: Annotated[
        int | None,
        typer.Option(help="Most rows, drawn by the run's seed; evaluation.max_examples if not given.", min=1),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            help="Of how many of them the model writes the answer, which is compared with the row's; three are shown. "
            "evaluation.generate if not given.",
            min=0,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as model.max_length=96.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Score an adapter on held-out rows of this machine, beside the adapter that the run began with.

    Nothing leaves this machine and nothing is charged: the score has no noise, so do not give away one of private data.
    With --state give the run file and the overrides that the coordinator was started with.

    Example: fedloom evaluate examples/sentiment.toml --adapter runs/sentiment/adapter --data sentiment
    """
    if adapter is not None and state is not None:
        raise ConfigError("--adapter and --state were given; one adapter is scored at a time, leave one of them out")
    config = load_run(run, (*(overrides or ()), *([] if generate is None else [f"evaluation.generate={generate}"])))
    source = data or (config.data.source if config.data else None)
    if source is None:
        raise ConfigError(f"{run} has no [data] section; name a file, a folder or a packaged data set with --data")
    if data is not None and Path(data).is_file():
        split = "train"  # as the readers call all of a file
    if max_examples is not None:
        limited = config.evaluation.model_copy(update={"max_examples": max_examples})
        config = config.model_copy(update={"evaluation": limited})
    folder = state or Path("runs") / config.run.name / "state"
    if adapter is None and not folder.is_dir():
        raise StoreError(f"{folder} does not exist; give a coordinator's state directory with --state, or --adapter")
    try:
        from fedloom.client.eval.held_out import HeldOut
    except ModuleNotFoundError as error:
        raise ConfigError(f"scoring needs {error.name!r}, which is not installed; install fedloom[client]") from error

    if adapter is not None:
        held_out = HeldOut.load(config, source, split)
        now, start, rounds = held_out.score_exported(adapter), held_out.score_start(), None
    else:
        from fedloom.server.build import build_strategy
        from fedloom.server.storage.verify import newest_state
        from fedloom.simulation.federation import completed
        from fedloom.strategies.state import state_from_bytes

        config = completed(config)
        content = newest_state(folder, config)
        held_out = HeldOut.load(config, source, split)
        reached = state_from_bytes(content, held_out.model.schema)
        start, rounds = held_out.score_start(), reached.round
        now = held_out.score(build_strategy(config).result(reached))
    language = task_traits(config.model.task).writes  # then the loss is that of a token
    scores = {"start": _document(start, language), "now": _document(now, language)}
    if json_only:
        scored = {"adapter": str(adapter)} if adapter is not None else {"state": str(folder), "rounds": rounds}
        print_json({**scored, "data": source, **scores, **_counted(now, config.model.labels)})
        return
    _show(scores, now, source)
    show_classes(now.confusion, config.model.labels)
    if rounds is not None:
        out.print(f"after {rounds} of {config.run.rounds} rounds, from {folder}")


def _counted(score: "Score", labels: tuple[str, ...]) -> dict[str, Any]:
    """How many rows, their classes, and a few of the texts that were written, for programs."""
    from fedloom.client.eval.confusion import classes_document

    shown = {"written": [each._asdict() for each in score.texts[:_SHOWN]]} if score.texts else {}
    return {"examples": score.examples, **classes_document(score.confusion, labels), **shown}


def _document(score: "Score", language: bool) -> dict[str, Any]:
    """A score for programs."""
    found = {"accuracy": score.accuracy, "loss": score.loss, **score.metrics}
    if language:
        found["perplexity"] = math.exp(score.loss) if score.loss < 700 else math.inf
    return found


def _show(scores: dict[str, dict[str, Any]], score: "Score", source: str) -> None:
    start, now = scores["start"], scores["now"]
    table = Table("", "start", "now", box=None, pad_edge=False)
    table.add_row("accuracy", f"{start['accuracy']:.1%}", Text(f"{now['accuracy']:.1%}", "bold"))
    table.add_row("loss", f"{start['loss']:.3f}", f"{now['loss']:.3f}")
    for name in (each for each in now if each in start and each not in ("accuracy", "loss")):
        table.add_row(name, f"{start[name]:.4g}", f"{now[name]:.4g}")
    out.print(table)
    for each in score.texts[:_SHOWN]:
        out.print(Text.assemble(("wanted   ", "dim"), each.wanted, ("\nwritten  ", "dim"), each.written))
    out.print(f"{score.examples:,} examples of {source}")
