"""The run folder: its name, a plot, and what is written as JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.core.errors import ConfigError
from fedloom.server.monitoring.recorders.api import RoundRecord, figures

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["draw", "metrics_frame", "new_folder", "plot", "write_json"]


def new_folder(parent: Path, name: str) -> Path:
    """Make and return parent/NAME, or NAME-2, NAME-3 ... when it is taken: results are never overwritten.

    Raises:
        ConfigError: The folder cannot be made.
    """

    def candidates() -> Iterator[Path]:
        yield parent / name
        for number in range(2, 10_000):
            yield parent / f"{name}-{number}"

    try:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in candidates():
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise ConfigError(f"run folder {parent / name} cannot be made: {error}; choose another with --out") from error
    raise ConfigError(f"{parent} holds 10,000 runs called {name!r}; choose another run.name")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a small document for people and programs."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def metrics_frame(records: Sequence[RoundRecord]) -> "pandas.DataFrame":
    """One row a round, by the round's number; round 0 is the starting adapter.

    Returns:
        Columns as in `figures`: accuracy (0 to 1) and loss (nats) of the rounds that were evaluated, the largest
        epsilon of the clients, bytes and seconds, and virtual_seconds where there are any. What a run has not is no
        column; what a round has not is NaN.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tables need pandas, which is not installed; pip install 'fedloom[notebook]', or read metrics.jsonl"
        ) from error
    rows = [figures(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pandas.DataFrame(rows, columns=columns, index=pandas.Index([r.round for r in records], name="round"))
    return table.astype({name: int for name in ("clients", "bytes_up", "bytes_down") if name in columns})


def plot(folder: Path, title: str, records: Sequence[RoundRecord]) -> Path:
    """Write the figure of `draw` to the run folder; returns the PNG."""
    path = folder / "curves.png"
    draw(title, records).savefig(path, dpi=130)
    return path


def draw(title: str, records: Sequence[RoundRecord]) -> "Figure":
    """Accuracy and loss, and in a private run the largest epsilon, against the round, or virtual time if there is."""
    # Imported here: it takes a second to load. Not by pyplot, whose backend is the whole process's: a figure of its own
    # draws without a display wherever it is.
    from matplotlib.figure import Figure

    scored = [r for r in records if r.accuracy is not None]
    private = [r for r in records if r.epsilon]
    figure = Figure(figsize=(12 if private else 8, 3.4), layout="constrained")
    axes = figure.subplots(1, 3 if private else 2)
    virtual = any(r.virtual_seconds is not None for r in records)

    def places(some: Sequence[RoundRecord]) -> list[float]:
        return [(r.virtual_seconds or 0.0) if virtual else r.round for r in some]

    axes[0].plot(places(scored), [100 * (r.accuracy or 0.0) for r in scored], marker="o", markersize=3, color="#1f6f8b")
    axes[0].set(title="Held-out accuracy", ylabel="%")
    axes[1].plot(places(scored), [r.loss for r in scored], marker="o", markersize=3, color="#b5542b")
    axes[1].set(title="Held-out loss", ylabel="cross-entropy (nats)")
    if private:
        spent = [max((r.epsilon or {}).values()) for r in private]
        axes[2].step(places(private), spent, where="post", color="#5b4b8a")
        axes[2].set(title="Privacy spent (largest of the clients)", ylabel="epsilon", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("virtual time (s)" if virtual else "round")
        axis.grid(alpha=0.3)
        if not virtual:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure
