"""Every scenario in two sizes, and the report of a run: `python -m tests.chaos.suite --size ci kills`."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos import faults, kills
from tests.chaos.driver import in_parallel, preload
from tests.chaos.kills import Result
from tests.chaos.trial import Trial

__all__ = ["CI", "FULL", "SCENARIOS", "Size", "main", "run"]

Tasks = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    chains: int
    """Times that every failpoint is reached, in chains of kills."""
    grid: bool
    """Whether every failpoint is also killed by itself in every phase, and fails in every other way."""
    random: int
    """Trials with 25 kills of the coordinator at random times."""
    storms: int
    """Trials with 10 to 30 kills of anybody at random times."""
    dropout: tuple[tuple[int, int, int], ...]
    """(updates wanted, clients that the rule asks for them, rounds)."""
    clocks: int
    split_brains: int
    crowd: int
    """Clients of a coordinator that is killed."""
    flood: int
    """Times as many updates at once as the coordinator takes on."""
    soak_s: float


CI = Size(1, False, 2, 1, ((5, 15, 4),), 1, 1, 60, 2, 10.0)
FULL = Size(5, True, 20, 20, ((5, 15, 100), (10, 24, 40)), 3, 5, 1000, 5, 1800.0)


def _grid(size: Size, seed: int, folder: Path) -> Tasks:
    """R1 and R2: every failpoint, on both sides, in every phase of a round."""
    chained: Tasks = {}
    for turn in range(size.chains):
        for number, arms in enumerate(kills.chains(seed + turn, 6)):
            name = f"chain-{turn}-{number}"
            chained[name] = partial(kills.chain, folder / name, arms, lambda rounds: faults.after(Trial(rounds=rounds)))
    if not size.grid:
        return chained
    (_, counted), *_ = in_parallel({"count": partial(kills.counted, Trial(), folder / "count")}, folder, 1)
    expected = faults.after(Trial())
    if counted.get("state") != expected:
        raise SystemExit(f"the undisturbed run is not what it must be: {counted.get('failure')}")
    cells = kills.cells(counted["hits"], actions=("crash", "raise", "ambiguous", "sleep:0.3"))
    alone = {name: partial(kills.kill, Trial(), folder / name, arms, expected) for name, arms in cells.items()}
    return chained | alone


def _random(size: Size, seed: int, folder: Path) -> Tasks:
    """R1: the coordinator is killed at random times."""
    trial = kills.long(60)
    expected = faults.after(trial)
    names = {f"random-{number}": seed + number for number in range(size.random)}
    return {
        name: partial(kills.storm, folder / name, each, 25, ("server",), expected, trial)
        for name, each in names.items()
    }


def _storms(size: Size, seed: int, folder: Path) -> Tasks:
    """R3: everybody is killed at random times."""
    trial = kills.long(40)
    expected, rng = faults.after(trial), random.Random(seed)
    nodes = ("server", *trial.names)
    names = {f"storm-{number}": seed + number for number in range(size.storms)}
    return {
        name: partial(kills.storm, folder / name, each, rng.randint(10, 30), nodes, expected, trial)
        for name, each in names.items()
    }


def _dropout(size: Size, seed: int, folder: Path) -> Tasks:
    """R4: three in ten of those who are asked die in the middle of the round."""
    return {
        f"dropout-{needed}": partial(faults.dropout, folder / f"dropout-{needed}", seed, needed, asked, rounds, 0.3)
        for needed, asked, rounds in size.dropout
    }


def _split_brain(size: Size, seed: int, folder: Path) -> Tasks:
    """R17: two coordinators on one state."""
    return {
        f"split-{number}": partial(faults.split_brain, folder / f"split-{number}")
        for number in range(size.split_brains)
    }


def _clock(size: Size, seed: int, folder: Path) -> Tasks:
    """R19: clocks that jump."""
    if faults.COMPILER is None:
        return {}
    chosen = ("all", "server", "clients")[: size.clocks]
    return {f"clock-{who}": partial(faults.clock, folder / f"clock-{who}", who, seed) for who in chosen}


def _many(size: Size, seed: int, folder: Path) -> Tasks:
    """R11: many clients come back to a coordinator that was killed."""
    return {"many": partial(faults.many, folder / "many", size.crowd, 4)}


def _overload(size: Size, seed: int, folder: Path) -> Tasks:
    """R12: several times as many updates at once as the coordinator takes on."""

    def flood() -> Result:
        from tests.chaos.load import overload  # it loads failpoints, which must not be before they are armed

        return overload(folder / "overload", size.flood, 0.02)

    return {"overload": flood}


def _soak(size: Size, seed: int, folder: Path) -> Tasks:
    """R15: rounds for a long time."""

    def rounds() -> Result:
        from tests.chaos.load import soak  # see there

        return soak(folder / "soak", size.soak_s)

    return {"soak": rounds}


SCENARIOS: Mapping[str, Callable[[Size, int, Path], Tasks]] = {
    "kill grid": _grid,
    "random kills": _random,
    "storms": _storms,
    "dropout": _dropout,
    "split brain": _split_brain,
    "clock": _clock,
    "many clients": _many,
    "overload": _overload,
    "soak": _soak,
}


def run(names: list[str], size: Size, seed: int, folder: Path, workers: int) -> dict[str, Any]:
    """The named scenarios, one after another; each task of a scenario has its own folder, kept if it fails."""
    report: dict[str, Any] = {}
    for name in names:
        start_s = time.monotonic()
        tasks = SCENARIOS[name](size, seed, folder)
        results: dict[str, Result] = {}
        for task, result in in_parallel(tasks, folder / "results", 1 if name == "many clients" else workers):
            results[task] = result
            print(f"{name}: {task}: {'FAILED' if 'failure' in result else 'ok'}", file=sys.stderr, flush=True)
            if "failure" not in result:
                shutil.rmtree(folder / task, ignore_errors=True)
        report[name] = _summary(results) | {"seconds": round(time.monotonic() - start_s, 1)}
    return report


def _summary(results: Mapping[str, Result]) -> dict[str, Any]:
    failures = {task: result["failure"] for task, result in results.items() if "failure" in result}
    kinds = ("restarts", "log", "state", "openings", "lost", "failure")
    restarts = sum(sum(result.get("restarts", {}).values()) for result in results.values())
    figures = {
        task: {key: value for key, value in result.items() if key not in kinds} for task, result in results.items()
    }
    return {
        "trials": len(results),
        "restarts": restarts,
        "failed": len(failures),
        "failures": failures,
        "figures": {task: found for task, found in figures.items() if found},
    }


def main() -> None:
    """Run scenarios and print their report as JSON; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--size", choices=("ci", "full"), default="ci")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3, help="trials at once; a trial mostly waits")
    options = parser.parse_args()
    preload()
    folder = Path(tempfile.mkdtemp(prefix="fedloom-chaos-"))
    report = run(options.scenarios, CI if options.size == "ci" else FULL, options.seed, folder, options.workers)
    print(json.dumps(report, indent=1))
    failed = sum(each["failed"] for each in report.values())
    if not failed:
        shutil.rmtree(folder)
    sys.exit(f"{failed} trials failed; their folders are in {folder}" if failed else 0)


if __name__ == "__main__":
    main()
