"""What a codec costs in accuracy: the same runs under each, noise and samples and all.

Two text tasks, without privacy and at epsilon 6; every run of one seed has the same start, partition, samples and
noise, so what differs is what the codec loses, both ways. Reported is the difference to float32 on all held-out rows,
paired by seed, with its interval, see runs.py. Rates are not tuned: they are the study's.

A finished run is one line of benchmarks/codec_accuracy.jsonl; started again, it goes on from there. Prints the table
and writes it to benchmarks/codec_accuracy.json.

    python benchmarks/codec_accuracy.py
    python benchmarks/codec_accuracy.py --smallest --lines smallest.jsonl --json smallest.json
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from runs import Arm, Outcome, compare, federate, interval, reported

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"

CODECS = ("fp32", "eden4", "eden2", "eden1")
"""The first is what the others are held against."""
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
COMMON = (
    *("run.rounds=6", 'model.base="minilm-l3-mean"', "model.max_length=32", "strategy.name=fedsvd"),
    *("evaluation.every=6", "evaluation.max_examples=2000"),
    *("adapter.layers=[0,1,2]", "train.schedule=linear", "train.ema=0"),
)
TASKS = {"sentiment": 0.003, "newsgroups": 0.008}
"""Sampling rate of the private runs' steps by task."""
LEVELS = {
    "none": ("privacy.enabled=false", "train.optimizer=adam", "train.steps=6", "train.microbatch=8"),
    "6": ("privacy.epsilon=6", "train.optimizer=sgd", "train.steps=4", "train.microbatch=128"),
}
RATES = {"none": 0.008, "6": 2.0}
SMALLEST = ("run.rounds=1", "train.steps=1", "data.max_examples=400", "evaluation.max_examples=100")


def arms(smallest: bool) -> list[Arm]:
    """One for each task, level of privacy and codec."""
    return [
        Arm(
            f"{task}, {level}",
            name,
            EXAMPLES / f"{task}.toml",
            (
                *COMMON,
                *how,
                f"train.sampling_rate={rate if level != 'none' else rate / 2:g}",
                *(f"wire.{way}={name}" for way in ("upload", "broadcast")),
                *(SMALLEST if smallest else ()),
            ),
            (RATES[level],),
        )
        for task, rate in TASKS.items()
        for level, how in LEVELS.items()
        for name in CODECS
    ]


def rows(arms: Sequence[Arm], outcomes: Sequence[Outcome], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The table: accuracy is that of all held-out rows, in points."""
    found = []
    for arm in arms:
        exact = next(each for each in arms if each.setting == arm.setting and each.method == CODECS[0])
        mine, theirs = (np.array([_accuracy(run) for run in reported(outcomes, each, seeds)]) for each in (arm, exact))
        task, level = arm.setting.split(", ")
        wide = interval(list(mine - theirs)) if len(seeds) > 1 else None
        found.append(
            {
                "task": task,
                "epsilon": None if level == "none" else float(level),
                "codec": arm.method,
                "accuracy": round(float(mine.mean()), 2),
                "difference": round(float((mine - theirs).mean()), 3),
                "difference_interval": None if wide is None else round(wide, 3),
                "by_seed": [round(float(each), 2) for each in mine],
            }
        )
    return found


def _accuracy(run: Outcome) -> float:
    """Over both halves: no rate was chosen."""
    return 50 * (run.tuning + run.report)


def main() -> None:
    """Run them and show the table."""
    parser = argparse.ArgumentParser(description="codecs against float32, paired by seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument(
        "--lines", type=Path, default=HERE / "codec_accuracy.jsonl", help="a line for each finished run"
    )
    parser.add_argument("--json", type=Path, default=HERE / "codec_accuracy.json", help="where the table goes")
    parser.add_argument("--smallest", action="store_true", help="one step of one round and two seeds")
    arguments = parser.parse_args()
    chosen, seeds = arms(arguments.smallest), SEEDS[:2] if arguments.smallest else SEEDS
    outcomes = compare(chosen, seeds, arguments.lines, arguments.workers, partial(federate, paired=True))
    table = rows(chosen, outcomes, seeds)
    arguments.json.write_text(json.dumps({"seeds": seeds, "rows": table}, indent=1) + "\n", encoding="utf-8")
    shown = Table("task", "epsilon", "codec", "accuracy", "difference to fp32")
    for row in table:
        level = "none" if row["epsilon"] is None else f"{row['epsilon']:g}"
        wide = "" if row["difference_interval"] is None else f" ± {row['difference_interval']:.2f}"
        shown.add_row(row["task"], level, row["codec"], f"{row['accuracy']:.1f}", f"{row['difference']:+.2f}{wide}")
    Console().print(shown)


if __name__ == "__main__":
    main()
