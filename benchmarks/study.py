"""Which method to choose: adapters and strategies on two tasks, without privacy and at two levels of it.

Every arm is a federation in small: 10 rounds of the run file's clients, pairs of rank 8 on queries and values.
Sentences are judged on three blocks of MiniLM whose head reads the mean of the tokens, all of them adapted; pictures
of clothes on the last two of DINOv2's twelve, so that the others are computed once for each picture. Under privacy an
arm takes its example gradients in few large batches with SGD; without, half as many again in small ones with Adam.
The head is trained along. All adapters are tried with the same two or three learning rates, see runs.py for how one
is chosen and for the interval. The frozen probe is the same federation of a linear classifier on the frozen base
model's features, with the same noise, see probe.py.

A finished run is one line of benchmarks/study.jsonl; started again, it goes on from there. Prints the table and writes
it to benchmarks/study.json.

    python benchmarks/study.py
    python benchmarks/study.py --smallest --lines smallest.jsonl --json smallest.json
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from probe import federate_probe
from rich.console import Console
from rich.table import Table
from runs import Arm, Outcome, Run, best, compare, federate, interval, reported

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"

PROBE = "frozen probe"
ORTHONORMAL = "strategy.options={orthonormal=true}"
METHODS: dict[str, tuple[str, ...]] = {
    "FedAvg": ("strategy.name=fedavg",),
    "FFA": ("strategy.name=ffa",),
    "FFA-orthonormal": ("strategy.name=ffa", ORTHONORMAL),
    "FedSVD": ("strategy.name=fedsvd",),
    "RoLoRA": ("strategy.name=rolora",),
    "alternating-orthonormal": ("strategy.name=alternating-orthonormal",),
    "FedEx": ("strategy.name=fedex",),
    "Fed-SB": ("strategy.name=fedavg", "adapter.kind=lora-sb", "adapter.rank=32"),
    "MiSS": ("strategy.name=fedavg", "adapter.kind=miss"),
    "bias": ("strategy.name=fedavg", "adapter.kind=bias"),
    "IA3": ("strategy.name=fedavg", "adapter.kind=ia3"),
    "head only": ("strategy.name=fedavg", "adapter.kind=head"),
    PROBE: (),
}
FROZEN = ("head only", PROBE)
"""Methods that adapt no block."""

COMMON = (
    *("run.rounds=10", "evaluation.max_examples=1000", "strategy.weighting=examples", "train.schedule=linear"),
    *("adapter.rank=8", "adapter.alpha=16", "privacy.delta=1e-5"),
)


@dataclass(frozen=True)
class Task:
    """What is learned."""

    file: str
    """Its run file."""
    overrides: tuple[str, ...]
    layers: str
    """The blocks with adapters."""
    rate: float
    """Sampling rate of four steps a round; without privacy there are six times as many, of a quarter."""


TASKS = {
    "sentiment": Task(
        "sentiment.toml",
        ('model.base="minilm-l3-mean"', "model.max_length=32"),
        "adapter.layers=[0,1,2]",
        0.007,
    ),
    "clothes": Task(
        "images.toml",
        ("model.image_size=28", "data.max_examples=12000", "data.classes_per_client=6"),
        "adapter.layers=[-2,-1]",
        0.015,
    ),
}


@dataclass(frozen=True)
class Level:
    """How private a run is, and how it trains."""

    overrides: tuple[str, ...]
    rates: tuple[float, ...]
    """Learning rates that every adapter is tried with."""
    probe: tuple[float, ...]
    """Those of the probe, whose features are longer than a head's; without privacy see probe.py."""
    head: float
    """Learning rate of the head over that of the rest."""


FEW = ("train.optimizer=sgd", "train.ema=0", "train.steps=4", "train.microbatch=128")
MANY = ("train.optimizer=adam", "train.ema=0", "train.steps=24", "train.microbatch=8")
LEVELS = {
    "none": Level(("privacy.enabled=false", *MANY), (0.002, 0.008), (0.01, 0.1, 1.0), 1.0),
    "6": Level(("privacy.epsilon=6", *FEW), (0.5, 2.0, 8.0), (2.0, 8.0, 32.0), 2.0),
    "1": Level(("privacy.epsilon=1", *FEW), (0.5, 2.0), (2.0, 8.0), 2.0),
}
SEEDS: tuple[int, ...] = (0, 1, 2)
SMALLEST = ("run.rounds=1", "train.steps=1", "data.max_examples=400", "evaluation.max_examples=100")


def arms(smallest: bool) -> list[Arm]:
    """One for each method, task and level of privacy."""
    found = []
    for name, task in TASKS.items():
        for level, how in LEVELS.items():
            size = f"train.sampling_rate={task.rate if level != 'none' else task.rate / 4:g}"
            common = (*COMMON, *task.overrides, *how.overrides, size, *(SMALLEST if smallest else ()))
            for method, own in METHODS.items():
                layers = () if method in FROZEN else (task.layers,)
                rates, head = (how.probe, 1.0) if method == PROBE else (how.rates, how.head)
                place = (f"{name}, {level}", method, EXAMPLES / task.file)
                found.append(Arm(*place, (*common, *own, *layers), rates[:1] if smallest else rates, head))
    # A worker keeps what the frozen blocks gave for one base model and number of them: arms that share it run together.
    return sorted(found, key=lambda arm: ([*TASKS].index(arm.setting.split(",")[0]), arm.method in FROZEN))


def train(run: Run) -> Outcome:
    """One run of any arm."""
    return federate_probe(run) if run.method == PROBE else federate(run)


def rows(arms: Sequence[Arm], outcomes: Sequence[Outcome], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The table: accuracy is the mean over the seeds on the half of the rows that chose nothing."""
    found = []
    for arm in arms:
        mine, task = reported(outcomes, arm, seeds), arm.setting.split(", ")
        frozen = _best_frozen([each for each in arms if each.setting == arm.setting], outcomes, seeds)
        # The rows and the clients' shares of them are those of the other method with the same seed.
        gains = [each.report - other.report for each, other in zip(mine, frozen, strict=True)]
        found.append(
            {
                "task": task[0],
                "epsilon": None if task[1] == "none" else float(task[1]),
                "method": arm.method,
                "learning_rate": best(outcomes, arm, seeds[0]).rate,
                **_spread("accuracy", [each.report for each in mine]),
                **_spread("over_frozen", gains),
                "by_seed": [round(each.report, 4) for each in mine],
                "spent": max((each.epsilon for each in mine if each.epsilon is not None), default=None),
                "values_up": mine[0].values,
                "kilobytes_up": round(4 * mine[0].values / 1000, 1),
                "commit_ms": round(1000 * float(np.mean([each.commit_seconds for each in mine])), 2),
                "seconds": round(float(np.mean([each.seconds for each in mine])), 1),
            }
        )
    return found


def _best_frozen(arms: Sequence[Arm], outcomes: Sequence[Outcome], seeds: Sequence[int]) -> list[Outcome]:
    """The runs of what an adapter has to beat: of the methods in FROZEN the one that did best on the tuning half."""
    each = [reported(outcomes, arm, seeds) for arm in arms if arm.method in FROZEN]
    return max(each, key=lambda runs: float(np.mean([run.tuning for run in runs])))


def _spread(name: str, figures: Sequence[float]) -> dict[str, float | None]:
    """Their mean, and half of its interval if there is more than one."""
    wide = None if len(figures) < 2 else round(interval(figures), 4)
    return {name: round(float(np.mean(figures)), 4), f"{name}_interval": wide}


def main() -> None:
    """Run the study and show its table."""
    parser = argparse.ArgumentParser(description="methods with and without privacy, tuned alike")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--lines", type=Path, default=HERE / "study.jsonl", help="a line for each finished run")
    parser.add_argument("--json", type=Path, default=HERE / "study.json", help="where the table goes")
    parser.add_argument("--smallest", action="store_true", help="one step of one round, one rate and one seed")
    arguments = parser.parse_args()
    chosen, seeds = arms(arguments.smallest), SEEDS[:1] if arguments.smallest else SEEDS
    table = rows(chosen, compare(chosen, seeds, arguments.lines, arguments.workers, train), seeds)
    arguments.json.write_text(json.dumps({"seeds": seeds, "rows": table}, indent=1) + "\n", encoding="utf-8")
    shown = Table("task", "epsilon", "method", "accuracy", "rate", "kB up", "commit")
    for row in table:
        spread = "" if row["accuracy_interval"] is None else f" ± {100 * row['accuracy_interval']:.1f}"
        level = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
        figures = (f"{row['learning_rate']:g}", f"{row['kilobytes_up']:.1f}", f"{row['commit_ms']:.1f} ms")
        shown.add_row(row["task"], level, row["method"], f"{row['accuracy']:.1%}{spread}", *figures)
    Console().print(shown)


if __name__ == "__main__":
    main()
