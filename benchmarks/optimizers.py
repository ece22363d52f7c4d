"""Local optimisers under privacy, on the run of examples/sentiment.toml in small.

Each arm is FedSVD over 10 rounds of 5 steps at sampling rate 0.02 with (6, 1e-5)-differential privacy, 32 tokens of
each sentence: 20,000 example gradients, half of the demo's. All arms have the same epsilon, steps and noise, and the
same seeds for start and partition; only what is done with the noised gradients differs. Every method has three learning
rates, each three times the one before, around what is usual for it; the best on one half of the held-out rows with the
first seed is run with the other seeds. The table has the other half: the mean over the seeds and a 95 % interval of
Student's t, which covers noise and start, not the choice of rows, which is the same for all.

A finished run is one line of benchmarks/optimizers.jsonl; started again with the same settings, it goes on from there.
The full size is 42 runs of about 350 CPU seconds each.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --smallest --lines smallest.jsonl    # a minute, to see that it runs
"""

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE.parent / "examples" / "sentiment.toml"

COMMON = (
    *("run.rounds=10", "train.steps=5", "train.sampling_rate=0.02"),
    *("evaluation.max_examples=2000", "model.max_length=32"),
)


@dataclass(frozen=True)
class Method:
    """An optimiser with its options."""

    overrides: tuple[str, ...]
    rate: float
    """The middle of the three learning rates."""
    head: float
    """Learning rate of the head over that of the rest."""


METHODS = {
    "sgd": Method(("train.optimizer=sgd",), 4.0, 0.5),
    "sgd, momentum 0.9": Method(("train.optimizer=sgd", "train.momentum=0.9"), 1.5, 0.5),
    "adam": Method(("train.optimizer=adam",), 0.003, 1.0),
    "adamw, noise corrected": Method(("train.optimizer=adamw", "train.noise_correction=true"), 0.001, 1.0),
    "muon, momentum 0.9": Method(("train.optimizer=muon", "train.momentum=0.9"), 0.005, 1.0),
    "spectrum, momentum 0.9": Method(("train.optimizer=spectrum", "train.momentum=0.9"), 1.5, 0.5),
}


@dataclass(frozen=True)
class Protocol:
    """How much of it is run."""

    overrides: tuple[str, ...] = COMMON
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    """Learning rates over a method's middle one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


SMALLEST = Protocol(
    (*COMMON, "run.rounds=1", "train.steps=1", "data.max_examples=400", "evaluation.max_examples=100"), (1.0,), (0,)
)


@dataclass(frozen=True)
class Arm:
    """One run."""

    method: str
    rate: float
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Accuracy on the two halves of the held-out rows."""

    method: str
    rate: float
    seed: int
    tuning: float
    report: float
    epsilon: float
    seconds: float


def arm(protocol: Protocol, name: str, rate: float, seed: int) -> Arm:
    """The run of a method at a rate."""
    method = METHODS[name]
    rates = (f"train.learning_rate={rate!r}", f"train.head_learning_rate={rate * method.head!r}")
    return Arm(name, rate, seed, (*protocol.overrides, *method.overrides, *rates, f"run.seed={seed}"))


def train(arm: Arm) -> Outcome:
    """Run one arm in this process, on one thread."""
    import torch

    from fedloom.client.data.tokens import Encoded
    from fedloom.client.eval.score import evaluate
    from fedloom.core.config.run import load_run
    from fedloom.server.build import build_strategy
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.storage.local import Store
    from fedloom.simulation.federation import build, completed
    from fedloom.simulation.inprocess import run_inprocess, standing_clock
    from fedloom.simulation.simulate import ledger_statements
    from fedloom.strategies.start import starting_adapter

    torch.set_num_threads(1)
    began, config = time.monotonic(), completed(load_run(RUN_FILE, arm.overrides))
    with tempfile.TemporaryDirectory(prefix="fedloom-study-") as folder:
        federation = build(config, Path(folder))
        model, rows, count = federation.model, federation.held_out, len(federation.clients)
        with Store(Path(folder) / "state", durable=False) as store:
            starting = starting_adapter(model.schema, config.run.seed)
            strategy = build_strategy(config)
            coordinator = Coordinator(
                config, model.schema, strategy, store, starting=starting, clock=standing_clock, expect=count
            )
            for _ in run_inprocess(federation, coordinator):
                pass
            model.load(coordinator.state.adapter)
        spent = max(each.epsilon for each in ledger_statements(federation).values())
        halves = (Encoded(rows.input_ids[first::2], rows.labels[first::2]) for first in (0, 1))
        tuning, report = (evaluate(model, half).accuracy for half in halves)
    return Outcome(arm.method, arm.rate, arm.seed, tuning, report, spent, time.monotonic() - began)


def study(protocol: Protocol, workers: int, path: Path) -> list[Outcome]:
    """Tune with the first seed, then run the chosen rates with the others; what `path` has is not run again."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes() + b"\n")  # the study was killed while it wrote a line
    outcomes = finished(protocol, path)
    first, *others = protocol.seeds
    grid = [arm(protocol, name, rate, first) for name in METHODS for rate in rates(protocol, name)]
    # Spawned, not forked: torch does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a", encoding="utf-8") as lines:

        def collect(arms: list[Arm]) -> None:
            done = {(each.method, each.rate, each.seed) for each in outcomes}
            missing = [each for each in arms if (each.method, each.rate, each.seed) not in done]
            for outcome in pool.imap_unordered(train, missing):
                outcomes.append(outcome)
                lines.write(json.dumps({"settings": settings(protocol), **asdict(outcome)}) + "\n")
                lines.flush()
                Console(stderr=True).print(f"{len(outcomes)} {outcome}")

        collect(grid)
        chosen = [best(outcomes, name, first) for name in METHODS]
        collect([arm(protocol, each.method, each.rate, seed) for each in chosen for seed in others])
    return outcomes


def rates(protocol: Protocol, name: str) -> list[float]:
    """The learning rates that a method is tried with."""
    return [float(f"{METHODS[name].rate * factor:.3g}") for factor in protocol.factors]


def settings(protocol: Protocol) -> str:
    """A digest of what the runs depend on, beside the code."""
    plain = [asdict(protocol), {name: asdict(method) for name, method in METHODS.items()}]
    return hashlib.sha256((json.dumps(plain) + RUN_FILE.read_text("utf-8")).encode()).hexdigest()[:16]


def finished(protocol: Protocol, path: Path) -> list[Outcome]:
    """The runs of earlier starts with the same settings."""
    return [Outcome(**line) for line in _lines(path) if line.pop("settings", None) == settings(protocol)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line that was not written to its end; its run is made again


def best(outcomes: list[Outcome], name: str, seed: int) -> Outcome:
    """The run of this seed whose rate did best on the tuning half."""
    return max((each for each in outcomes if (each.method, each.seed) == (name, seed)), key=lambda each: each.tuning)


def interval(scores: list[float]) -> float:
    """Half of the 95 % interval of a mean; infinite of one score."""
    if len(scores) < 2:
        return float("inf")
    return float(student.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / np.sqrt(len(scores)))


def main() -> None:
    """Run the study and show its table."""
    parser = argparse.ArgumentParser(description="local optimisers under the same privacy, tuned alike")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--lines", type=Path, default=HERE / "optimizers.jsonl", help="a line for each finished run")
    parser.add_argument("--smallest", action="store_true", help="one step of one round, one rate and one seed")
    arguments = parser.parse_args()
    protocol = SMALLEST if arguments.smallest else Protocol()
    outcomes = study(protocol, arguments.workers, arguments.lines)
    table = Table("optimizer", "learning rate", "epsilon", "accuracy", "by seed")
    for name in METHODS:
        chosen = best(outcomes, name, protocol.seeds[0])
        same = sorted((each for each in outcomes if (each.method, each.rate) == (name, chosen.rate)), key=_seed)
        scores = [each.report for each in same]
        mean = f"{np.mean(scores):.1%} ± {100 * interval(scores):.1f}"
        row = (name, f"{chosen.rate:g}", f"{chosen.epsilon:.2f}", mean, ", ".join(f"{each:.1%}" for each in scores))
        table.add_row(*row)
    Console().print(table)


def _seed(outcome: Outcome) -> int:
    return outcome.seed


if __name__ == "__main__":
    main()
