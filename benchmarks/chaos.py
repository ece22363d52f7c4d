"""Every chaos scenario at full size: writes chaos.json beside this file and the table in docs/track-record.md.

    PYTHONPATH=. python benchmarks/chaos.py

What a scenario does, and what must hold after it, is in tests/chaos. It takes tens of minutes and leaves the reports as
they are when something failed, with exit status 1.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.proto.failpoints import CALLS, LINES
from tests.chaos import suite
from tests.chaos.driver import preload

__all__ = ["main", "table"]

REPORT = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "track-record.md"
_START, _END = "<!-- report: made by benchmarks/chaos.py -->\n", "<!-- end of report -->"

Report = Mapping[str, Any]


def _total(found: Report, key: str) -> int:
    return sum(each[key] for each in found["figures"].values())


def _worst(found: Report, key: str) -> float:
    return max((float(each[key]) for each in found["figures"].values()), default=0.0)


ROWS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "kill grid": (
        "R1, R2: every failpoint in every phase, on both sides",
        lambda r: f"{len(CALLS | LINES)} failpoints, {r['trials']} trials, {r['restarts']} restarts",
    ),
    "random kills": ("R1: the coordinator at random times", lambda r: f"{_total(r, 'kills')} kills"),
    "storms": ("R3: everybody at random times", lambda r: f"{r['trials']} seeds, {_total(r, 'kills')} kills"),
    "dropout": (
        "R4: 30 % of those asked die in the round",
        lambda r: (
            f"{_total(r, 'rounds')} rounds, {_total(r, 'kills')} kills, {_total(r, 'opened_again')} rounds opened again"
        ),
    ),
    "split brain": (
        "R17: a second coordinator on the same state",
        lambda r: f"{r['trials']} trials; refused within {_worst(r, 'refused_s'):.2f} s, the stale one fenced off",
    ),
    "clock": ("R19: clocks jump by up to a day", lambda r: f"{_total(r, 'jumps')} jumps in {r['trials']} trials"),
    "many clients": (
        "R11: the coordinator of many clients is killed",
        lambda r: (
            f"{_total(r, 'clients')} clients; serving after {_worst(r, 'serving_s'):.1f} s, "
            f"the last back after {_worst(r, 'all_back_s'):.1f} s"
        ),
    ),
}
"""What each scenario stands for, and its figures in a line."""


def table(report: Report) -> str:
    """The report as a page shows it."""
    lines = ["| goal | what was done | came out otherwise |", "|---|---|---|"]
    for name, (goal, figures) in ROWS.items():
        found = report["scenarios"].get(name)
        if found and found["trials"]:
            lines.append(f"| {goal} | {figures(found)} | {found['failed']} |")
        else:
            lines.append(f"| {goal} | left out | |")
    where = f"{report['duration_s'] / 60:.0f} minutes on {report['cpus']} shared cores, Python {report['python']}"
    lines += [
        "",
        f"Seed {report['seed']}, {report['date']}, {where}. All figures: [chaos.json](../benchmarks/chaos.json).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, and write the reports if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="trials at once")
    options = parser.parse_args()
    start_s, date = time.monotonic(), time.strftime("%Y-%m-%d")
    preload()
    folder = Path(tempfile.mkdtemp(prefix="fedloom-chaos-"))
    scenarios = suite.run(list(ROWS), suite.FULL, options.seed, folder, options.workers)
    report = {
        "date": date,
        "seed": options.seed,
        "duration_s": round(time.monotonic() - start_s),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "scenarios": scenarios,
    }
    print(table(report))
    if failed := sum(each["failed"] for each in scenarios.values()):
        print(json.dumps(report, indent=1))
        sys.exit(f"{failed} trials failed; their folders are in {folder}")
    shutil.rmtree(folder)
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        sys.exit(f"{PAGE.name} has lost its marks {_START.strip()} and {_END}; put them back")
    PAGE.write_text(f"{before}{_START}\n{table(report)}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
