"""Write the tables of docs/study.md from benchmarks/study.json; `--check` exits 1 when they are not what it has."""

import json
from pathlib import Path
from typing import Any

from docs.made import between_marks, write

TARGET = Path(__file__).with_name("study.md")
SOURCE = TARGET.parent.parent / "benchmarks" / "study.json"

_LEVELS = {None: "no privacy", 6.0: "ε = 6", 1.0: "ε = 1"}


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    rows = json.loads(SOURCE.read_text(encoding="utf-8"))["rows"]
    tables = "\n".join(_table(task, rows) for task in dict.fromkeys(row["task"] for row in rows))
    write("make_study", {TARGET: between_marks(TARGET, "make_study", f"\n{tables}\n")})


def _table(task: str, rows: list[dict[str, Any]]) -> str:
    mine = {(row["method"], row["epsilon"]): row for row in rows if row["task"] == task}
    lines = [
        f"### {task.capitalize()}\n",
        f"| method | values sent | kB up | server, ms | {' | '.join(_LEVELS.values())} |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(method for method, _ in mine):
        levels = [mine[method, level] for level in _LEVELS]
        figures = f"{levels[0]['values_up']:,} | {levels[0]['kilobytes_up']:,.0f} | {levels[0]['commit_ms']:.1f}"
        lines.append(f"| {method} | {figures} | {' | '.join(map(_accuracy, levels))} |")
    return "\n".join(lines) + "\n"


def _accuracy(row: dict[str, Any]) -> str:
    """In bold where the interval of the gain over what is frozen lies above 0."""
    text = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_interval']:.1f}"
    return f"**{text}**" if row["over_frozen"] > row["over_frozen_interval"] else text


if __name__ == "__main__":
    main()
