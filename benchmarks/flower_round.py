"""What a round costs when nothing is trained: two clients behind Flower's SuperLink, and behind our own coordinator.

Real flower-superlink, flower-supernode and flwr processes on the loopback interface, a resident trainer for each node,
and the demo's base model with its LoRA adapter; each round is one step with a sample that is almost surely empty.
Prints the table of docs/flower.md and writes benchmarks/flower_round.json.

    make flower && PYTHONPATH=. python benchmarks/flower_round.py
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fedloom.client.assets.fetch import fetch
from fedloom.core.config.run import load_run
from fedloom.simulation.simulate import simulate
from tests.flower.federation import superlink, write_run

HERE = Path(__file__).resolve().parent
CLIENTS = 2
COMMITTED = re.compile(r"^(\S+ \S+),(\d{3}) INFO fedloom\.flower\.launch: round \d+/\d+ committed", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="rounds; the first is not counted")
    rounds: int = parser.parse_args().rounds
    # A short path, since the residents' sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="fl"))
    try:
        run = emptied(folder, rounds)
        found = {"flower": through_flower(folder, run), "grpc": over_grpc(folder, run)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {
        engine: {"median": round(median(each), 2), "least": round(min(each), 2), "most": round(max(each), 2)}
        for engine, each in found.items()
    }
    result = {"clients": CLIENTS, "rounds": {engine: len(each) for engine, each in found.items()}, "seconds": seconds}
    (HERE / "flower_round.json").write_text(json.dumps(result, indent=1) + "\n")
    show(seconds)


def emptied(folder: Path, rounds: int) -> Path:
    """A run file on the demo's base model whose samples are empty."""
    run = write_run(folder, fetch("minilm-l6"), clients=CLIENTS, rounds=rounds)
    text = run.read_text().replace("steps = 3", "steps = 1").replace("sampling_rate = 0.5", "sampling_rate = 1e-9")
    run.write_text(text + f"\n[evaluation]\nevery = {rounds + 1}\n")
    return run


def through_flower(folder: Path, run: Path) -> Sequence[float]:
    """Seconds from commit to commit, by the ServerApp's own clock."""
    command = [sys.executable, "-m", "fedloom.cli.main", "flower", "export", str(folder / "app"), "--run", str(run)]
    subprocess.run([*command, "--clients", str(folder / "c")], check=True, stdout=subprocess.DEVNULL)
    policies = {name: folder / "c" / name / "policy.toml" for name in ("client-0", "client-1")}
    with superlink(folder, policies) as link:
        said = link.run(folder / "app", folder / "runs")
    times = [datetime.fromisoformat(f"{day}.{thousandths}") for day, thousandths in COMMITTED.findall(said)]
    return [(after - before).total_seconds() for before, after in pairwise(times)]


def over_grpc(folder: Path, run: Path) -> Sequence[float]:
    """Seconds from commit to commit, as the simulation saw them, which looks ten times a second.

    The last one is left out: its figure has the evaluation of the final adapter in it.
    """
    records = simulate(load_run(run), folder / "grpc").records[1:-1]
    return [after.seconds - before.seconds for before, after in pairwise(records)]


def show(seconds: dict[str, dict[str, float]]) -> None:
    table = Table("empty round, 2 clients", "median", "least", "most")
    for engine, figures in seconds.items():
        table.add_row(engine, *(f"{figures[key]:g} s" for key in ("median", "least", "most")))
    Console().print(table)


if __name__ == "__main__":
    main()
