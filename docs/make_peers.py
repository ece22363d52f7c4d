"""Write the tables of docs/benchmarks.md from benchmarks/peers/results.json; `--check` exits 1 when they are stale."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.made import between_marks, write

TARGET = Path(__file__).with_name("benchmarks.md")
SOURCE = TARGET.parent.parent / "benchmarks" / "peers" / "results.json"

WORKS = {
    "empty": "An empty round of 2 clients, deployed: 786,432 float32 values go out and come back",
    "lora-2": "A round of 2 simulated clients, each 2 steps of 16 texts of 32 tokens",
    "lora-8": "The same of 8 simulated clients",
    "lora-20": "The same of 20 simulated clients",
    "deployed-2": "The same of 2 deployed clients, each in processes of its own",
    "deployed-8": "The same of 8 deployed clients",
    "virtual-1000": "A round of 1,000 simulated clients, each one step of 4 texts of 16 tokens",
}
ENGINES = {
    "fedloom": "fedloom",
    "fedloom-private": "fedloom, DP-SGD",
    "fedloom-deployed": "fedloom",
    "fedloom-empty": "fedloom",
    "bare": "no framework: a loop with PEFT",
    "pfl": "pfl-research",
    "pfl-workers": "pfl-research, a worker for each core",
    "flower": "Flower, Ray",
    "flower-deployed": "Flower, SuperLink and SuperNodes",
    "nvflare": "NVFlare, simulator",
}
_HEAD = ("", "round", "beside fedloom", "clients/s", "start-up", "memory", "of the server", "kB up", "kB down")
_PEERS = ("pfl", "flower", "nvflare")
_NONE = "–"
"""In the place of a figure that there is not."""


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    document = json.loads(SOURCE.read_text(encoding="utf-8"))
    content = "\n".join(["", *_parts(document), ""])
    write("make_peers", {TARGET: between_marks(TARGET, "make_peers", content)})


def _parts(document: Mapping[str, Any]) -> Iterable[str]:
    for title, about in document.items():
        repeats = about["rows"][0]["repeats"]
        yield f"## {WORKS[title]}\n"
        yield (
            f"Measured {about['date']} on {about['cores']} of {about['cores_there']} cores ({about['processor']}), "
            f"Python {about['python']}, a load of {about['load_before']:.1f} before; repetitions: {repeats}.\n"
        )
        yield from _table(about["rows"])
        yield ""
        yield _lost(about["rows"])
        versions = about["versions"]
        yield f"Versions: {', '.join(f'{name} {versions[name]}' for name in sorted(versions))}.\n"
        if about["left_out"]:
            yield f"Not installed, and left out: {', '.join(ENGINES[name] for name in about['left_out'])}.\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    least = min(row["round_s"] for row in rows if row["engine"] not in ("bare", "fedloom-private"))
    yield f"| {' | '.join(_HEAD)} |"
    yield f"|{'---|' * len(_HEAD)}"
    for row in rows:
        took = _seconds(row["round_s"])
        spread = f" ({min(row['rounds_s']):.3g} to {max(row['rounds_s']):.3g})" if row["repeats"] > 1 else ""
        cells = (
            ENGINES[row["engine"]],
            f"{f'**{took}**' if row['round_s'] == least else took}{spread}",
            f"{row['ratio']:.3g}" if "ratio" in row else _NONE,
            f"{row['clients_per_s']:.3g}",
            _figure(row, "start_s", 1, " s"),
            _figure(row, "peak_mib", 1, " MiB"),
            _figure(row, "server_mib", 1, " MiB"),
            _figure(row, "bytes_up", 1e3),
            _figure(row, "bytes_down", 1e3),
        )
        yield f"| {' | '.join(cells)} |"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _figure(row: Mapping[str, Any], key: str, unit: float, after: str = "") -> str:
    return f"{row[key] / unit:,.0f}{after}" if key in row else _NONE


def _lost(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which peers are faster than fedloom, in words."""
    faster = [
        f"{ENGINES[row['engine']]} ({row['ratio']:.3g} of fedloom's round)"
        for row in rows
        if row["engine"].startswith(_PEERS) and row.get("ratio", 1) < 1
    ]
    return f"Faster than fedloom: {', '.join(faster)}.\n" if faster else "No peer is faster than fedloom.\n"


if __name__ == "__main__":
    main()
