"""Which method to choose: adapters and strategies on two tasks, without privacy and at two levels of it.

Every arm is a federation of the run file's clients in small: 10 rounds, 32 tokens of each text, adapters on the last
two of the base model's six blocks, so that the others are computed once for each text. Under privacy it takes 10,000
example gradients or so in few large batches with SGD; without, as many in more and smaller batches with Adam. The head
is trained along. Every arm has three learning rates of one grid for all arms, see runs.py for how one is
chosen and for the interval. The frozen probe is the same federation of a linear classifier on the frozen base model's
mean embeddings, with the same noise, see probe.py.

A finished run is one line of benchmarks/study.jsonl; started again, it goes on from there. Prints the table and writes
it to benchmarks/study.json.

    python benchmarks/study.py
    python benchmarks/study.py --smallest --lines smallest.jsonl --json smallest.json
"""

import argparse
import json
import os
from collections.abc import Sequence
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
    "Fed-SB": ("strategy.name=fedavg", "adapter.kind=lora-sb"),
    "MiSS": ("strategy.name=fedavg", "adapter.kind=miss"),
    "bias": ("strategy.name=fedavg", "adapter.kind=bias"),
    "IA3": ("strategy.name=fedavg", "adapter.kind=ia3"),
    "head only": ("strategy.name=fedavg", "adapter.kind=head"),
    PROBE: (),
}

COMMON = (
    *("run.rounds=10", "model.max_length=32", "evaluation.max_examples=1000", "strategy.weighting=examples"),
    "train.schedule=linear",
)
LAYERS = "adapter.layers=[-2,-1]"
"""Not for an adapter that has no layers: a head alone."""
TASKS = {"sentiment": ("sentiment.toml", 0.01), "newsgroups": ("newsgroups.toml", 0.02)}
"""Run file, and the sampling rate of five steps a round; without privacy there are five times as many of a fifth."""
LEVELS = {
    "none": ("privacy.enabled=false", "train.optimizer=adam", "train.steps=25"),
    "6": ("privacy.epsilon=6", "train.optimizer=sgd", "train.steps=5"),
    "1": ("privacy.epsilon=1", "train.optimizer=sgd", "train.steps=5"),
}
RATES: dict[bool, tuple[float, ...]] = {True: (1.0, 4.0, 16.0), False: (0.001, 0.003, 0.01)}
"""With privacy (SGD on clipped gradients) and without (Adam)."""
STRENGTHS: tuple[float, ...] = (0.01, 0.1, 1.0)
"""Of the probe without privacy, see probe.py."""
SEEDS: tuple[int, ...] = (0, 1, 2)
SMALLEST = ("run.rounds=1", "train.steps=1", "data.max_examples=400", "evaluation.max_examples=100")


def arms(smallest: bool) -> list[Arm]:
    """One for each method, task and level of privacy."""
    found = []
    for task, (file, rate) in TASKS.items():
        for level, privacy in LEVELS.items():
            for name, how in METHODS.items():
                private = level != "none"
                layers = () if name in ("head only", PROBE) else (LAYERS,)
                size = f"train.sampling_rate={rate if private else rate / 5:g}"
                overrides = (*COMMON, *privacy, size, *how, *layers, *(SMALLEST if smallest else ()))
                rates = STRENGTHS if name == PROBE and not private else RATES[private]
                rates = rates[:1] if smallest else rates
                found.append(Arm(f"{task}, {level}", name, EXAMPLES / file, overrides, rates, 0.5 if private else 1.0))
    # A worker keeps what the frozen blocks gave for one number of them: those without layers come last.
    return sorted(found, key=lambda arm: LAYERS not in arm.overrides)


def train(run: Run) -> Outcome:
    """One run of any arm."""
    return federate_probe(run) if run.method == PROBE else federate(run)


def rows(arms: Sequence[Arm], outcomes: Sequence[Outcome], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The table: accuracy is the mean over the seeds on the half of the rows that chose nothing."""
    found = []
    for arm in arms:
        mine = reported(outcomes, arm, seeds)
        scores, task = [each.report for each in mine], arm.setting.split(", ")
        found.append(
            {
                "task": task[0],
                "epsilon": None if task[1] == "none" else float(task[1]),
                "method": arm.method,
                "learning_rate": best(outcomes, arm, seeds[0]).rate,
                "accuracy": round(float(np.mean(scores)), 4),
                "interval": None if len(scores) < 2 else round(interval(scores), 4),
                "by_seed": [round(each, 4) for each in scores],
                "spent": max((each.epsilon for each in mine if each.epsilon is not None), default=None),
                "kilobytes_up": round(4 * mine[0].values / 1000, 1),
                "commit_ms": round(1000 * float(np.mean([each.commit_seconds for each in mine])), 2),
                "seconds": round(float(np.mean([each.seconds for each in mine])), 1),
            }
        )
    return found


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
        spread = "" if row["interval"] is None else f" ± {100 * row['interval']:.1f}"
        level = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
        figures = (f"{row['learning_rate']:g}", f"{row['kilobytes_up']:.1f}", f"{row['commit_ms']:.1f} ms")
        shown.add_row(row["task"], level, row["method"], f"{row['accuracy']:.1%}{spread}", *figures)
    Console().print(shown)


if __name__ == "__main__":
    main()
