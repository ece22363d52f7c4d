"""Local optimisers under privacy, on the sentences of examples/sentiment.toml.

Each arm is FedSVD over 10 rounds of 4 steps at sampling rate 0.01 with (6, 1e-5)-differential privacy, on three blocks
of MiniLM whose head reads the mean of the tokens, and 24 tokens of each sentence: 8,000 example gradients. All arms
have the same epsilon, steps and seeds for start and partition; what differs is how gradients are clipped, noised and
followed. Every method has three learning rates, each three times the one before, around what is usual for it. See
runs.py for how rates are chosen and for the interval. A finished run is one line of benchmarks/optimizers.jsonl;
started again, it goes on from there.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --smallest --lines smallest.jsonl    # a minute, to see that it runs
"""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from runs import Arm, best, compare, interval, reported

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE.parent / "examples" / "sentiment.toml"

COMMON = (
    *("run.rounds=10", "train.steps=4", "train.sampling_rate=0.01", 'model.base="minilm-l3-mean"'),
    *("train.ema=0", "evaluation.max_examples=1000", "model.max_length=24", "train.microbatch=128"),
)
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)
FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates over a method's middle one."""
SMALLEST = ("run.rounds=1", "train.steps=2", "data.max_examples=400", "evaluation.max_examples=100")


@dataclass(frozen=True)
class Method:
    """An optimiser with its options."""

    overrides: tuple[str, ...]
    rate: float
    """The middle of the three learning rates."""
    head: float
    """Learning rate of the head over that of the rest."""


METHODS = {
    "sgd": Method(("train.optimizer=sgd",), 2.0, 2.0),
    "sgd, momentum 0.9": Method(("train.optimizer=sgd", "train.momentum=0.9"), 0.6, 2.0),
    "sgd, mean of iterates": Method(("train.optimizer=sgd", "train.ema=0.5"), 2.0, 2.0),
    "sgd, noise over 2 bands": Method(("train.optimizer=sgd", "privacy.noise_bands=2"), 2.0, 2.0),
    "sgd, automatic clipping": Method(("train.optimizer=sgd", "privacy.clipping=automatic"), 2.0, 2.0),
    "adam": Method(("train.optimizer=adam",), 0.003, 1.0),
    "adamw, noise corrected": Method(("train.optimizer=adamw", "train.noise_correction=true"), 0.001, 1.0),
    "muon, momentum 0.9": Method(("train.optimizer=muon", "train.momentum=0.9"), 0.005, 1.0),
    "spectrum, momentum 0.9": Method(("train.optimizer=spectrum", "train.momentum=0.9"), 0.6, 2.0),
}


def arms() -> list[Arm]:
    """One for each optimiser."""
    return [
        Arm("epsilon 6", name, RUN_FILE, (*COMMON, *each.overrides), rates(each.rate), each.head)
        for name, each in METHODS.items()
    ]


def rates(middle: float) -> tuple[float, ...]:
    """The learning rates that a method is tried with."""
    return tuple(float(f"{middle * factor:.3g}") for factor in FACTORS)


def main() -> None:
    """Run them and show the table."""
    parser = argparse.ArgumentParser(description="local optimisers under the same privacy, tuned alike")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--lines", type=Path, default=HERE / "optimizers.jsonl", help="a line for each finished run")
    parser.add_argument("--smallest", action="store_true", help="two steps of one round, one rate and one seed")
    arguments = parser.parse_args()
    chosen, seeds = arms(), SEEDS
    if arguments.smallest:
        chosen = [replace(e, overrides=(*e.overrides, *SMALLEST), rates=e.rates[:1]) for e in chosen]
        seeds = SEEDS[:1]
    outcomes = compare(chosen, seeds, arguments.lines, arguments.workers)
    table = Table("optimizer", "learning rate", "epsilon", "accuracy", "by seed")
    for arm in chosen:
        scores = [each.report for each in reported(outcomes, arm, seeds)]
        pick = best(outcomes, arm, seeds[0])
        mean = f"{np.mean(scores):.1%} ± {100 * interval(scores):.1f}"
        row = (arm.method, f"{pick.rate:g}", f"{pick.epsilon:.2f}", mean, ", ".join(f"{e:.1%}" for e in scores))
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
