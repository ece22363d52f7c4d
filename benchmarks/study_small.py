"""A small study: four strategies, with and without privacy, beside centralised LoRA and a frozen linear probe.

Every arm is the run of examples/sentiment.toml in small: under privacy 20,000 example gradients in few large batches
with SGD, without it 8,000 in more and smaller ones with Adam. (FedAvg with 8,000 under this privacy does not leave the
plateau that training starts on.) Each method's learning rate is chosen from the same grid by one half of the held-out
rows, with the first seed; the table reports the other half, over all seeds. Prints a table and writes
benchmarks/study_small.json after every run; started again with the same settings, it goes on.

    python benchmarks/study_small.py
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RUN_FILE = HERE.parent / "examples" / "sentiment.toml"

METHODS: dict[str, tuple[str, ...]] = {
    "FedAvg": ("strategy.name=fedavg",),
    "FFA": ("strategy.name=ffa",),
    "FFA-orthonormal": ("strategy.name=ffa", "strategy.options={orthonormal=true}"),
    "FedSVD": ("strategy.name=fedsvd",),
}
PRIVATE = ("train.optimizer=sgd", "run.rounds=10", "train.steps=5", "train.sampling_rate=0.02")
OPEN = ("train.optimizer=adam", "run.rounds=10", "train.steps=12", "train.sampling_rate=0.00335")
CENTRALISED: tuple[str, ...] = (
    *("strategy.name=fedavg", "data.clients=1", 'data.partition="iid"', "rounds.min_clients=1"),
    *("train.optimizer=adam", "train.steps=24", "train.sampling_rate=0.001675"),
)
RATES = {True: (4.0, 8.0), False: (0.001, 0.003)}
"""Learning rates tried with privacy (SGD; the head gets half) and without (Adam; the head gets the same)."""

PROBE = "linear probe"
SEEDS = (0, 1)
HELD_OUT = 2000
MAX_LENGTH = 32


@dataclass(frozen=True)
class Arm:
    """One training run."""

    method: str
    private: bool
    rate: float
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Accuracy on the two halves of the held-out rows."""

    method: str
    private: bool
    rate: float
    seed: int
    tuning: float
    report: float
    epsilon: float | None
    seconds: float


def train(arm: Arm) -> Outcome:
    """Run one arm in this process, on one thread."""
    import torch

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
    began = time.monotonic()
    common = (
        f"train.learning_rate={arm.rate}",
        f"train.head_learning_rate={arm.rate / 2 if arm.private else arm.rate}",
        f"run.seed={arm.seed}",
        f"privacy.enabled={str(arm.private).lower()}",
        f"evaluation.max_examples={HELD_OUT}",
        f"model.max_length={MAX_LENGTH}",
    )
    config = completed(load_run(RUN_FILE, (*common, *arm.overrides)))
    with tempfile.TemporaryDirectory(prefix="fedloom-study-") as folder:
        federation = build(config, Path(folder))
        schema = federation.model.schema
        with Store(Path(folder) / "state", durable=False) as store:
            starting = starting_adapter(schema, config.run.seed)
            strategy = build_strategy(config)
            count = len(federation.clients)
            coordinator = Coordinator(
                config, schema, strategy, store, starting=starting, clock=standing_clock, expect=count
            )
            for _ in run_inprocess(federation, coordinator):
                pass
            federation.model.load(coordinator.state.adapter)
        stated = ledger_statements(federation).values() if arm.private else ()
        spent = max((each.epsilon for each in stated), default=None)
        tuning, report = (evaluate(federation.model, part).accuracy for part in split(federation.held_out))
    return Outcome(arm.method, arm.private, arm.rate, arm.seed, tuning, report, spent, time.monotonic() - began)


def split(held_out: Any) -> tuple[Any, Any]:
    """The held-out rows in two halves, every other row each."""
    from fedloom.client.data.tokens import Encoded

    return (
        Encoded(held_out.input_ids[::2], held_out.labels[::2]),
        Encoded(held_out.input_ids[1::2], held_out.labels[1::2]),
    )


def probe(seed: int) -> Outcome:
    """Logistic regression on the frozen base model's mean-pooled embeddings of all training rows, pooled centrally."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from fedloom.client.data.tokens import Encoded, collate, encode, microbatches
    from fedloom.core.config.run import load_run
    from fedloom.simulation.federation import build, completed

    torch.set_num_threads(1)
    began = time.monotonic()
    overrides = (
        f"run.seed={seed}",
        f"evaluation.max_examples={HELD_OUT}",
        f"model.max_length={MAX_LENGTH}",
        "privacy.enabled=false",
    )
    with tempfile.TemporaryDirectory(prefix="fedloom-study-") as folder:
        federation = build(completed(load_run(RUN_FILE, overrides)), Path(folder))
    model = federation.model
    encoder = model.model.base_model.model.base_model

    def embed(rows: Encoded) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = np.zeros((len(rows), encoder.config.hidden_size))
        with torch.inference_mode():
            for part in microbatches(np.arange(len(rows)), rows, 64):
                batch = collate(rows, part, model.tokenizer.pad_token_id)
                mask = batch["attention_mask"].unsqueeze(-1)
                hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
                found[part] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return found

    limit = federation.config.model.max_length
    parts = [encode(rows, model.tokenizer, limit) for rows in federation.clients.values()]
    scaler = StandardScaler()
    x = scaler.fit_transform(np.concatenate([embed(part) for part in parts]))
    y = np.concatenate([part.labels for part in parts])
    tuning, report = split(federation.held_out)
    scored = []
    for strength in (1e-3, 1e-2, 1e-1):
        fitted = LogisticRegression(C=strength, max_iter=2000).fit(x, y)
        scores = [float(fitted.score(scaler.transform(embed(half)), half.labels)) for half in (tuning, report)]
        scored.append((*scores, strength))
    best = max(scored)
    return Outcome(PROBE, False, best[2], seed, best[0], best[1], None, time.monotonic() - began)


def study(workers: int, path: Path) -> list[Outcome]:
    """Tune with the first seed, then run the chosen rate with the others; what `path` has is not run again."""
    outcomes = finished(path)
    arms = [
        (name, private, (*how, *(PRIVATE if private else OPEN)))
        for name, how in METHODS.items()
        for private in (True, False)
    ]
    arms.append(("centralised LoRA", False, CENTRALISED))
    ways = {(name, private): how for name, private, how in arms}
    grid = [Arm(name, private, rate, SEEDS[0], how) for name, private, how in arms for rate in RATES[private]]
    # Spawned, not forked: torch and gRPC do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:

        def collect(results: Iterable[Outcome]) -> None:
            for outcome in results:
                outcomes.append(outcome)
                Console(stderr=True).print(f"{len(outcomes)} {outcome}")
                write(path, outcomes)

        done = {(o.method, o.private, o.rate, o.seed) for o in outcomes}
        collect(pool.imap_unordered(train, [a for a in grid if (a.method, a.private, a.rate, a.seed) not in done]))
        chosen = [best(outcomes, name, private) for name, private, _ in arms]
        rest = [Arm(o.method, o.private, o.rate, seed, ways[o.method, o.private]) for o in chosen for seed in SEEDS[1:]]
        collect(pool.imap_unordered(train, [a for a in rest if (a.method, a.private, a.rate, a.seed) not in done]))
        probed = {o.seed for o in outcomes if o.method == PROBE}
        collect(pool.imap_unordered(probe, [seed for seed in SEEDS if seed not in probed]))
    return outcomes


def finished(path: Path) -> list[Outcome]:
    """The runs of an earlier start with the same settings."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    return [Outcome(**run) for run in document["runs"]] if document["settings"] == settings() else []


def settings() -> dict[str, Any]:
    """What the runs depend on, beside the code."""
    lists = {"methods": METHODS, "private": PRIVATE, "open": OPEN, "centralised": CENTRALISED}
    plain = {
        **lists,
        "rates": [*RATES.items()],
        "seeds": SEEDS,
        "held_out": HELD_OUT,
        "max_length": MAX_LENGTH,
        "run_file": RUN_FILE.read_text("utf-8"),
    }
    restored: dict[str, Any] = json.loads(json.dumps(plain))
    return restored


def write(path: Path, outcomes: list[Outcome]) -> None:
    """Save every run, and the table as far as it goes."""
    document = {
        "seconds_of_training": round(sum(outcome.seconds for outcome in outcomes)),
        "held_out_for_report": HELD_OUT // 2,
        "rows": summarise(outcomes),
        "runs": [asdict(outcome) for outcome in outcomes],
        "settings": settings(),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def best(outcomes: list[Outcome], method: str, private: bool) -> Outcome:
    """The outcome of the first seed whose rate did best on the tuning half."""
    mine = [o for o in outcomes if (o.method, o.private, o.seed) == (method, private, SEEDS[0])]
    return max(mine, key=lambda outcome: outcome.tuning)


def summarise(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row per method and privacy: the chosen rate and the reporting half's accuracy over the seeds."""
    rows: list[dict[str, Any]] = []
    for method, private in dict.fromkeys((o.method, o.private) for o in outcomes):
        mine = [o for o in outcomes if (o.method, o.private) == (method, private)]
        if not any(o.seed == SEEDS[0] for o in mine):
            continue
        chosen = best(outcomes, method, private)
        same = sorted((o for o in mine if method == PROBE or o.rate == chosen.rate), key=lambda o: o.seed)
        scores = [o.report for o in same]
        row = {"method": method, "private": private, "learning_rate": chosen.rate, "epsilon": chosen.epsilon}
        rows.append({**row, "accuracy": float(np.mean(scores)), "by_seed": scores})
    return rows


def main() -> None:
    """Run the study and show its table."""
    parser = argparse.ArgumentParser(description="four strategies with and without privacy, tuned alike")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--json", type=Path, default=HERE / "study_small.json", help="where the figures go")
    arguments = parser.parse_args()
    rows = summarise(study(arguments.workers, arguments.json))
    table = Table("method", "privacy", "learning rate", "accuracy", "by seed")
    for row in rows:
        privacy = f"epsilon {row['epsilon']:.2f}" if row["private"] else "none"
        seeds = ", ".join(f"{score:.1%}" for score in row["by_seed"])
        table.add_row(row["method"], privacy, f"{row['learning_rate']:g}", f"{row['accuracy']:.1%}", seeds)
    Console().print(table)


if __name__ == "__main__":
    main()
