"""The figure of `fedloom inspect --plot`."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_inspection"]

_BLOCK = re.compile(r"\.(\d+)\.")
_COLUMNS = 3
_COLORS = ("#1f6f8b", "#b5542b", "#5b4b8a", "#4c8c4a", "#a23b72", "#6b705c")

Panel = Callable[["Axes"], None]


def draw_inspection(document: Mapping[str, Any], path: Path) -> None:
    """Write what `fedloom inspect` found as a picture, of the kind that the file's name ends with.

    Args:
        document: As --json prints it.
        path: Where to.

    Raises:
        ConfigError: The file cannot be written, or is of a kind that matplotlib does not know.
    """
    # Imported here: it takes a second to load. Not by pyplot, whose backend is the whole process's.
    from matplotlib.figure import Figure

    panels = _panels(document)
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, axes in zip(panels, places, strict=False):
        panel(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(" against ".join(str(document[key]) for key in ("adapter", "against") if document[key]))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}; give a file such as adapter.png") from error


def _panels(document: Mapping[str, Any]) -> list[Panel]:
    layers, rounds = document["layers"], document.get("rounds") or []
    panels = [
        _by_layer("Norm of s B A", layers, "norm"),
        _by_layer("Effective rank", layers, "effective_rank"),
    ]
    if any("cosine" in each for each in layers):
        panels.append(_by_layer("Cosine with the other adapter", layers, "cosine"))
        panels.append(_by_layer("Overlap of outputs", layers, "output_overlap"))
    if any("intruders" in each for each in layers):
        panels.append(_by_layer("Intruder dimensions", layers, "intruders"))
    if rounds and rounds[-1]["clients"]:
        last = rounds[-1]
        parts = [
            {**each, "part": each["averaging_error"] / each["change"]}
            for each in last["layers"]
            if each["averaging_error"] is not None and each["change"]
        ]
        if parts:
            panels.append(_by_layer(f"Averaging error in round {last['round']}, part of change", parts, "part"))
        if last["noise_share"] is not None:
            panels.append(_by_layer(f"Noise share in round {last['round']}", last["layers"], "noise_share"))
        panels.append(lambda axes: _distances(axes, last))
    if len(rounds) > 1:
        panels.append(lambda axes: _by_round(axes, rounds))
    return panels


def _by_layer(title: str, layers: Sequence[Mapping[str, Any]], key: str) -> Panel:
    """A line for each kind of layer, over the blocks of the model; a dashed one for each layer that is in no block."""
    series: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for each in layers:
        if block := _BLOCK.search(each["module"]):
            series.setdefault(each["module"][block.end() :], {})[int(block[1])] = each[key]
        else:
            outside[each["module"]] = each[key]

    from matplotlib.ticker import MaxNLocator

    def panel(axes: "Axes") -> None:
        colors = itertools.cycle(_COLORS)
        for kind, values in series.items():
            blocks = sorted(values)
            axes.plot(blocks, [values[b] for b in blocks], marker="o", markersize=3, color=next(colors), label=kind)
        for name, value in outside.items():
            axes.axhline(value, linestyle="--", color=next(colors), label=name)
        axes.set(title=title, xlabel="block")
        axes.set_ylim(*_ends(each[key] for each in layers))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if layers:
            axes.legend(fontsize="x-small")

    return panel


def _ends(values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis with zero in it."""
    low, high = 0.0, 0.0
    for each in values:
        low, high = min(low, each), max(high, each)
    return 1.1 * low, 1.1 * high or 1.0


def _by_round(axes: "Axes", rounds: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    names = {"cosine": "cosine with the round before", "output_overlap": "overlap of outputs", "noise_share": "noise"}
    for color, (key, label) in zip(_COLORS, names.items(), strict=False):
        found = [(each["round"], each[key]) for each in rounds if each.get(key) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", markersize=3, color=color, label=label)
    axes.set(title="From round to round", xlabel="round")
    axes.set_ylim(*_ends(each[key] or 0.0 for each in rounds for key in names if key in each))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _distances(axes: "Axes", last: Mapping[str, Any]) -> None:
    shown = axes.imshow(last["distances"], cmap="viridis", vmin=0)
    names = [each["client"] for each in last["clients"]]
    if len(names) <= 16:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="x-small")
        axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_title(f"Distances between clients, round {last['round']}")
    axes.figure.colorbar(shown, ax=axes)
