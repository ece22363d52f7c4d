"""`fedloom runs compare`: what two simulated runs were asked, and what came of them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedloom.cli.console import Json, out, print_json
from fedloom.core.config.parsing import read_toml
from fedloom.core.errors import ConfigError

__all__ = ["compare"]

Folder = Annotated[Path, typer.Argument(help="A run folder that `fedloom simulate` made, such as runs/sentiment.")]


def compare(first: Folder, second: Folder, json_only: Json = False) -> None:
    """Show where two runs' files differ, and their last figures, side by side.

    Runs that are still under way are shown as far as they have come.

    Example: fedloom runs compare runs/sentiment runs/sentiment-no-privacy
    """
    asked = [_flat(read_toml(_needed(folder, "run.toml"))) for folder in (first, second)]
    keys = dict.fromkeys(key for each in asked for key in each)
    pairs = {key: [each.get(key) for each in asked] for key in keys}
    differences = {key: [one, two] for key, (one, two) in pairs.items() if one != two}
    figures = [_figures(folder) for folder in (first, second)]
    if json_only:
        print_json({"runs": [str(first), str(second)], "differences": differences, "figures": figures})
        return
    table = Table("", str(first), str(second), box=None, pad_edge=False)
    for key, values in differences.items():
        table.add_row(key, *("left out" if value is None else repr(value) for value in values))
    table.add_section()
    for name in figures[0]:
        if all(each[name] is None for each in figures):
            continue  # nobody has measured it
        table.add_row(name.replace("_", " "), *(_shown(name, each[name]) for each in figures))
    out.print(table)


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """section.key to value; an option of the strategy is a key of its own."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _needed(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}; give run folders that `fedloom simulate` made, such as runs/NAME")
    return path


def _figures(folder: Path) -> dict[str, Any]:
    """What a run has come to, by its metrics."""
    from fedloom.server.monitoring.recorders.api import read_metrics

    _needed(folder, "metrics.jsonl")
    records = read_metrics(folder)
    scored = [each for each in records if each.accuracy is not None]
    last, best = (each[-1] if each else None for each in (records, scored))
    told: dict[str, float | None] = next((each.federated for each in reversed(records) if each.federated), {})
    spent = max(last.epsilon.values(), default=None) if last and last.epsilon else None
    return {
        "rounds": last.round if last else 0,
        "accuracy": best.accuracy if best else None,
        "loss": best.loss if best else None,
        "federated_accuracy": told.get("accuracy"),
        "federated_accuracy_margin": told.get("accuracy_margin"),
        "federated_loss": told.get("loss"),
        "federated_loss_margin": told.get("loss_margin"),
        "epsilon": spent,
        "megabytes_up": sum(each.bytes_up for each in records) / 1e6,
        "megabytes_down": sum(each.bytes_down for each in records) / 1e6,
        "seconds": last.seconds if last else 0.0,
        "virtual_seconds": last.virtual_seconds if last else None,
    }


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:.4g}"
