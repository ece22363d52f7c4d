"""Every chaos scenario at full size: writes chaos.json beside this file and the table in docs/track-record.md.

    PYTHONPATH=. python benchmarks/chaos.py
    PYTHONPATH=. python benchmarks/chaos.py --only storms --only "R7: disk faults"

What a scenario does, and what must hold after it, is in tests/chaos. All of them take hours. Each part is written into
the reports when it has come out as it must, and otherwise left there as it was, with exit status 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fedloom.core.runtime.failpoints import CALLS, LINES

__all__ = ["main", "table"]

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "track-record.md"
_LINK = "[chaos.json](../benchmarks/chaos.json)"
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
            f"{_total(r, 'rounds')} rounds, {_total(r, 'kills')} kills; with as many asked as the rule says "
            f"{_total(r, 'full_cohorts')}, of which {_total(r, 'full_opened_again')} had to be opened again"
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
    "overload": (
        "R12: five times as many updates at once as the coordinator takes on, its disk slow",
        lambda r: (
            f"{_total(r, 'clients')} clients, {_total(r, 'refusals')} refusals with a time to come back, "
            f"{_worst(r, 'goodput_of_fitting'):.0%} of the rate of a load that fits; "
            f"{_worst(r, 'peak_mib'):.0f} MiB against {_worst(r, 'peak_mib_of_fitting'):.0f}"
        ),
    ),
    "soak": (
        "R15: rounds without an end",
        lambda r: (
            f"{_worst(r, 'seconds') / 60:.0f} minutes, {_total(r, 'rounds')} rounds; "
            f"{_worst(r, 'mib'):.0f} MiB, {_worst(r, 'mib_per_1000_rounds'):+.2f} for every 1,000 rounds, "
            f"which at this pace is {_worst(r, 'mib_per_hour'):+.1f} an hour"
        ),
    ),
}
"""What each scenario stands for, and its figures in a line."""


LIMITS: dict[str, dict[str, Callable[[float], bool]]] = {
    "split brain": {"refused_s": lambda s: s <= 1},
    "many clients": {"serving_s": lambda s: s <= 5, "all_back_s": lambda s: s <= 15},
    "overload": {"goodput_of_fitting": lambda part: part >= 0.8, "heartbeat_afterwards_s": lambda s: s < 1},
    "soak": {"mib_per_1000_rounds": lambda mib: mib < 1},
}
"""What figures of a scenario must be. They are times and slopes, so they bind here and not in the tests."""


def _removals() -> str:
    """Names the tests in which a safeguard of reliability.toml is taken out."""
    text = (ROOT / "tests" / "mutations" / "reliability.toml").read_text(encoding="utf-8")
    names = [each["name"] for each in tomllib.loads(text)["mutation"]]
    return f"test_every_mutation_is_killed and ({' or '.join(names)})"


PROOFS: dict[str, tuple[str, ...]] = {
    "R5: exactly once": ("tests/server/rounds/test_exactly_once.py",),
    "R6: the ledger never counts too little": (
        "tests/client/ledger/test_ledger_sequences.py",
        "tests/client/ledger/test_ledger_tampering.py",
        "tests/simulation/test_sync_order.py",
    ),
    "R7: disk faults": ("tests/faults_server/test_disk.py",),
    "R8: bytes change": ("tests/faults_server/test_flips.py", "tests/client/ledger/test_flips.py"),
    "R9: fuzzing": ("tests/proto/test_fuzz.py",),
    "R13: abuse": ("tests/server/auth/test_abuse.py",),
    "R14: memory of 200 clients and of 10": ("tests/faults_server/test_cohort_memory.py",),
    "R16: compatibility": ("tests/proto/test_golden.py", "tests/server/storage/test_old_state.py"),
    "R18: revocation": ("tests/simulation/end_to_end/test_revocation.py",),
    "each safeguard taken out is missed by its test": ("tests/mutations", "-k", _removals()),
    "attacks: low bits of the noise": ("tests/attacks/test_low_bits.py", "tests/attacks/test_denormal_clip_norm.py"),
    "attacks: neighbouring data sets": ("tests/attacks/test_neighbours.py",),
    "attacks: hostile numbers": ("tests/attacks/test_fuzz_hostile.py",),
}
"""Goals that tests reach by themselves, at full size with FEDLOOM_PROVE=1."""


def table(report: Report) -> str:
    """The report as a page shows it."""
    lines = ["| goal | what was done | seed | minutes | came out otherwise |", "|---|---|---|---|---|"]
    for name, (goal, figures) in ROWS.items():
        found = report.get(name)
        done = figures(found) if found and found["trials"] else "not yet"
        lines.append(_row(goal, done, found))
    for goal, arguments in PROOFS.items():
        found = report.get(goal)
        shown = ", ".join(f"`{file.removeprefix('tests/')}`" for file in arguments if file.startswith("tests/"))
        said = [f"{found['passed']} passed", *found["said"]] if found else ["not yet"]
        lines.append(_row(goal, f"{shown}: {'; '.join(said)}", found))
    dates = sorted({found["date"] for found in report.values()})
    machines = sorted({found["machine"] for found in report.values()})
    lines += ["", f"{' to '.join(dates[:: len(dates) - 1 or 1])}, {'; '.join(machines)}. All figures: {_LINK}."]
    return "\n".join(lines) + "\n"


def _row(goal: str, done: str, found: Report | None) -> str:
    if found is None:
        return f"| {goal} | {done} | | | |"
    return f"| {goal} | {done} | {found.get('seed', '')} | {found['seconds'] / 60:.1f} | {found['failed']} |"


def _scenarios(names: list[str], seed: int, workers: int) -> "subprocess.Popen[str]":
    """Scenarios at full size, in a process of their own; its output is their report."""
    command = [sys.executable, "-m", "tests.chaos.suite", "--size", "full", f"--seed={seed}", f"--workers={workers}"]
    return subprocess.Popen([*command, *names], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _reported(process: "subprocess.Popen[str]", seed: int) -> dict[str, Any]:
    output, _ = process.communicate()
    if not output:
        sys.exit(f"{process.args!r} has no report; its own error is above")
    report: dict[str, dict[str, Any]] = json.loads(output)
    return {name: {**found, "seed": seed} for name, found in report.items()}


def _beyond(name: str, found: Report) -> list[str]:
    """Figures of a scenario that are not what they must be."""
    limits = LIMITS.get(name, {})
    return [
        f"{name}: {key} is {figures[key]}"
        for figures in found.get("figures", {}).values()
        for key, holds in limits.items()
        if key in figures and not holds(figures[key])
    ]


def _proof(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Run tests at full size: how many passed and failed, and what they said on lines of their own."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={path}",
            "-o",
            "junit_logging=system-out",
            *arguments,
        ]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "FEDLOOM_PROVE": "1"}, stdout=sys.stderr, check=False)
        suite_ = ElementTree.parse(path).getroot()[0]
    counts = {key: int(suite_.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    printed = [[line for line in (each.text or "").splitlines() if _figure(line)] for each in suite_.iter("system-out")]
    said = [lines[-1].strip() for lines in printed if lines]  # a test's last word is its sum
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - start_s, 1),
        "said": said,
    }


def _figure(line: str) -> bool:
    """Whether a line is one that a test has printed, not the frame around it."""
    return any(letter.isdigit() for letter in line) and not line.startswith(("-", "{", "["))


def _keep(parts: Mapping[str, dict[str, Any]]) -> list[str]:
    """Write what has come out as it must into both reports; what has not."""
    report: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    wrong: list[str] = []
    machine = f"{os.cpu_count()} shared cores, Python {platform.python_version()}"
    for name, found in parts.items():
        problems = _beyond(name, found) + [f"{name}: {found['failed']} failed"] * (found["failed"] > 0)
        if problems:
            print(json.dumps({name: found}, indent=1))
            wrong += problems
        else:
            report[name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine, **found}
    ordered = {name: report[name] for name in (*ROWS, *PROOFS) if name in report}
    REPORT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    _, end, after = rest.partition(_END)
    if not (start and end):
        sys.exit(f"{PAGE.name} has lost its marks {_START.strip()} and {_END}; put them back")
    PAGE.write_text(f"{before}{_START}\n{table(ordered)}\n{_END}{after}", encoding="utf-8")
    return wrong


def main() -> None:
    """Run, and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="trials at once")
    parser.add_argument("--only", action="append", choices=[*ROWS, *PROOFS], help="a part; may be given again")
    options = parser.parse_args()
    wanted = options.only or [*ROWS, *PROOFS]
    wrong: list[str] = []
    # The soak takes its time and little else, so it goes on beside what is not timed.
    soaking = _scenarios(["soak"], options.seed, 1) if "soak" in wanted else None
    for name in wanted:
        if name in ROWS and name not in LIMITS:
            wrong += _keep(_reported(_scenarios([name], options.seed, options.workers), options.seed))
    if soaking:
        wrong += _keep(_reported(soaking, options.seed))
    for name in wanted:
        if name in LIMITS and name != "soak":
            wrong += _keep(_reported(_scenarios([name], options.seed, 1), options.seed))
    for goal in wanted:
        if goal in PROOFS:
            wrong += _keep({goal: _proof(PROOFS[goal])})
    print(PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0])
    if wrong:
        sys.exit(f"came out otherwise: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
