"""What each codec loses, measured, by its formula, and the least that an unbiased codec of as many bits loses.

Measured over 8 seeds of 2^18 values each, drawn from a normal and from a heavy-tailed distribution (Student's t, 3
degrees of freedom). The formulas are integrals over a normal distribution that use nothing of the codecs but their
levels. Prints the table and writes it to benchmarks/codec_error.json, and a plot to docs/codec-error.svg.

    python benchmarks/codec_error.py
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from scipy.integrate import quad
from scipy.stats import norm

from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.codecs.eden import EDEN1, EDEN2, EDEN3, EDEN4, Eden
from fedloom.core.codecs.rows import ROW
from fedloom.core.schema import Array, Role, Schema, TensorSpec

HERE = Path(__file__).resolve().parent
PLOT = HERE.parent / "docs" / "codec-error.svg"

SEEDS, VALUES = 8, 1 << 18
SCHEMA = Schema((TensorSpec("m.B", "m", Role.LORA_B, (VALUES // ROW, ROW)),))


def eden(levels: Sequence[float], bounds: Sequence[float]) -> float:
    """D / (1 - D), D what is left of a normal value's variance once the best multiple of the levels is taken off."""
    edges = [0.0, *bounds, math.inf]
    parts = [(level, *edges[place : place + 2]) for place, level in enumerate(levels)]
    along = 2 * sum(level * (norm.pdf(low) - norm.pdf(high)) for level, low, high in parts)
    square = 2 * sum(level**2 * (norm.cdf(high) - norm.cdf(low)) for level, low, high in parts)
    left = 1 - along**2 / square
    return float(left / (1 - left))


def grid(bits: int, share: float) -> float:
    """Steps from -m to m, m the largest of a row of normal values: step^2 times `share`."""
    squared, _ = quad(lambda m: 2 * m * (1 - (2 * norm.cdf(m) - 1) ** ROW), 0, 12, points=(3, 4, 5))
    return float(share * squared / (2 ** (bits - 1) - 1) ** 2)


def rounded(precision: int) -> float:
    """To the nearest number with `precision` bits: spacing^2 / 12, over the powers of two between which values lie."""
    parts = (
        2 * (norm.cdf(2.0 ** (power + 1)) - norm.cdf(2.0**power)) * 4.0 ** (power + 1 - precision) / 12
        for power in range(-14, 4)
    )
    return float(sum(parts))


def largest(share: float) -> float:
    """What the other values of a normal sample have of its squared length."""
    bound = norm.isf(share / 2)
    return float(1 - share - 2 * bound * norm.pdf(bound))


def _eden(which: type[Eden]) -> Callable[[], float]:
    return lambda: eden(which.levels, which.bounds)


FORMULAS: dict[str, Callable[[], float]] = {
    "eden1": _eden(EDEN1),
    "eden2": _eden(EDEN2),
    "top10": lambda: largest(0.1),
    "eden3": _eden(EDEN3),
    "eden4": _eden(EDEN4),
    "int4": lambda: grid(4, 1 / 6),
    "int8": lambda: grid(8, 1 / 12),
    "bf16": lambda: rounded(8),
    "fp16": lambda: rounded(11),
}


def measured(name: str, draw: Callable[[np.random.Generator], Array]) -> float:
    """Squared error over squared length, the mean over the seeds."""
    found = []
    for seed in range(SEEDS):
        values = draw(np.random.default_rng(seed)).astype(np.float32)
        payload = codec(name).encode(SCHEMA, {"m.B": values}, seed_of("error", seed))
        lost = codec(name).decode(SCHEMA, payload)["m.B"].astype(np.float64) - values
        found.append(float(np.square(lost).sum() / np.square(values.astype(np.float64)).sum()))
    return float(np.mean(found))


def rows() -> list[dict[str, Any]]:
    """The table."""
    shape = (VALUES // ROW, ROW)
    found = []
    for name, formula in FORMULAS.items():
        bits = 8 * codec(name).encoded_size(SCHEMA) / VALUES
        found.append(
            {
                "codec": name,
                "bits": round(bits, 4),
                "normal": measured(name, lambda rng: rng.standard_normal(shape)),
                "heavy": measured(name, lambda rng: rng.standard_t(3, shape)),
                "formula": float(formula()),
                "floor": 1 / (4**bits - 1),
            }
        )
    return found


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Errors over bits, both in powers."""
    mpl.rcParams.update({"svg.hashsalt": "fedloom", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.5, 5))
    bits = np.geomspace(0.9, 18, 200)
    axes.plot(bits, 1 / (4**bits - 1), color="0.55", label="least of an unbiased codec, 1 / (4ᵇ - 1)")
    looks: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("formula", {"marker": "_", "s": 260, "color": "black"}, "formula, normal values"),
        ("normal", {"marker": "o", "s": 34, "color": "tab:blue"}, "measured, normal values"),
        ("heavy", {"marker": "x", "s": 34, "color": "tab:red"}, "measured, heavy tails"),
    )
    for key, look, label in looks:
        axes.scatter([row["bits"] for row in table], [row[key] for row in table], label=label, zorder=3, **look)
    for row in table:
        place = (6, -13) if row["codec"].startswith("eden") else (8, 5)
        axes.annotate(row["codec"], (row["bits"], row["normal"]), place, textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="bits a value, scales and all", ylabel="squared error / squared length")
    axes.set_xticks([1, 2, 3, 4, 8, 16], ["1", "2", "3", "4", "8", "16"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, show, write."""
    table = rows()
    (HERE / "codec_error.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    plot(table, PLOT)
    shown = Table("codec", "bits", "normal", "heavy tails", "formula", "least, unbiased")
    for row in table:
        figures = (f"{row[key]:.3g}" for key in ("normal", "heavy", "formula", "floor"))
        shown.add_row(row["codec"], f"{row['bits']:.2f}", *figures)
    Console().print(shown)


if __name__ == "__main__":
    main()
