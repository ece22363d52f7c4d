"""Write the table of docs/wire.md from benchmarks/codec_accuracy.json; `--check` exits 1 when it is not what it has."""

import json
from pathlib import Path
from typing import Any

from docs.made import between_marks, write

TARGET = Path(__file__).with_name("wire.md")
SOURCE = TARGET.parent.parent / "benchmarks" / "codec_accuracy.json"


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    rows = json.loads(SOURCE.read_text(encoding="utf-8"))["rows"]
    lines = ["| task | privacy | codec | accuracy | difference to fp32 |", "|---|---|---|---|---|", *map(_line, rows)]
    write("make_wire", {TARGET: between_marks(TARGET, "make_wire", "\n" + "\n".join(lines) + "\n")})


def _line(row: dict[str, Any]) -> str:
    level = "none" if row["epsilon"] is None else f"ε = {row['epsilon']:g}"
    apart = "" if row["codec"] == "fp32" else f"{row['difference']:+.2f} ± {row['difference_interval']:.2f}"
    return f"| {row['task']} | {level} | `{row['codec']}` | {row['accuracy']:.1f} % | {apart} |"


if __name__ == "__main__":
    main()
