"""Small training runs side by side, tuned alike.

Each method is tried with all of its rates and the first seed, and run with the other seeds at the rate that did best on
one half of the held-out rows; the other half is reported. Every finished run is a line of a file, from which a
comparison that was stopped goes on. Intervals are 95 % ones of Student's t over the seeds: they cover noise, start,
partition and the draw of the held-out rows, which all methods share at one seed.
"""

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from fedloom.client.data.load import load_rows
from fedloom.core.config.run import RunConfig
from fedloom.simulation.federation import Given, divided
from fedloom.strategies.api import Plan, State, Strategy

__all__ = ["Arm", "Outcome", "Run", "compare", "federate", "given", "interval", "reported", "settings"]


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: str
    """What is the same for all methods that are compared: task, privacy."""
    method: str
    rate: float
    seed: int
    file: str
    """The run file that it starts from."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    setting: str
    method: str
    rate: float
    seed: int
    tuning: float
    """Accuracy on the half of the held-out rows by which the rate is chosen."""
    report: float
    """Accuracy on the other half."""
    epsilon: float | None
    """The most that a client has spent; None without privacy."""
    values: int
    """Values that a client sends in a round, the head's with them; the mean over the rounds."""
    commit_seconds: float
    """What the coordinator computed in a round, the mean over the rounds."""
    seconds: float


@dataclass(frozen=True)
class Arm:
    """A method in a setting, with the rates that it is tried with."""

    setting: str
    method: str
    file: Path
    overrides: tuple[str, ...]
    rates: tuple[float, ...]
    head: float = 1.0
    """Learning rate of the head over that of the rest."""

    def at(self, rate: float, seed: int) -> Run:
        """The run with this rate and seed."""
        rates = (f"train.learning_rate={rate!r}", f"train.head_learning_rate={rate * self.head!r}")
        return Run(self.setting, self.method, rate, seed, str(self.file), (*self.overrides, *rates, f"run.seed={seed}"))


class _Measured:
    """A strategy, and what it came to."""

    def __init__(self, inner: Strategy) -> None:
        self.inner, self.seconds = inner, 0.0
        self.sent: dict[int, int] = {}
        """Values that a client sends, by round."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def plan(self, state: State, round: int, client: str) -> Plan:
        plan = self.inner.plan(state, round, client)
        schema = state.schema if plan.rank is None else state.schema.with_rank(plan.rank)
        self.sent[round] = schema.select(plan.train).size - schema.select(plan.personal).size
        return plan

    def commit(self, state: State, acc: Any) -> State:
        began = time.monotonic()
        try:
            return self.inner.commit(state, acc)
        finally:
            self.seconds += time.monotonic() - began


_read = lru_cache(maxsize=2)(load_rows)


def given(config: RunConfig) -> Given:
    """The rows of a run file on packaged data, which the next run of this process need not read and check again."""
    assert config.data is not None
    model = config.model
    own, scored = (_read(config.data.source, model.labels, split, model.task) for split in ("train", "test"))
    return Given(divided(own, config, config.data), scored)


def federate(run: Run, paired: bool = False) -> Outcome:
    """Train in this process, on one thread.

    Args:
        run: What is trained.
        paired: Whether samples and noise follow from seed, round and client, so that runs differ by what is compared
            alone.
    """
    import torch

    from fedloom.client.eval.score import evaluate
    from fedloom.core.config.run import load_run
    from fedloom.server.build import build_strategy
    from fedloom.server.coordinator import Coordinator
    from fedloom.server.storage.local import Store
    from fedloom.simulation.federation import build, completed
    from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
    from fedloom.simulation.simulate import ledger_statements
    from fedloom.strategies.start import starting_adapter

    torch.set_num_threads(1)
    began, config = time.monotonic(), completed(load_run(Path(run.file), run.overrides))
    with tempfile.TemporaryDirectory(prefix="fedloom-benchmark-") as folder:
        federation = build(config, Path(folder), given(config))
        model, rows = federation.model, federation.held_out
        strategy = _Measured(build_strategy(config))
        starting = starting_adapter(model.schema, config.run.seed)
        with Store(Path(folder) / "state", durable=False) as store:
            coordinator = Coordinator(
                config,
                model.schema,
                cast(Strategy, strategy),
                store,
                starting=starting,
                clock=standing_clock,
                expect=len(federation.clients),
            )
            drawn: dict[str, Callable[[int], Any]] = {
                name: partial(_drawn, run.seed, place) for place, name in enumerate(federation.clients)
            }
            for _ in run_inprocess(federation, coordinator, entropy=drawn if paired else None):
                pass
            model.show(strategy.result(coordinator.state))
        spent = [each.epsilon for each in ledger_statements(federation).values()] if config.privacy.enabled else []
        halves = [
            replace(
                rows,
                **{name: getattr(rows, name)[first::2] for name in ("input_ids", "labels", "targets", "media")},
            )
            for first in (0, 1)
        ]
        tuning, report = (evaluate(model, half).accuracy for half in halves)
    return Outcome(
        *(run.setting, run.method, run.rate, run.seed, tuning, report, max(spent, default=None)),
        values=round(float(np.mean(list(strategy.sent.values())))),
        commit_seconds=strategy.seconds / config.run.rounds,
        seconds=time.monotonic() - began,
    )


def _drawn(seed: int, client: int, round: int) -> Any:
    from fedloom.client.privacy.dp_sgd.rng import Seeded

    return Seeded(seed, client, round)


def compare(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    path: Path,
    workers: int,
    train: Callable[[Run], Outcome] = federate,
) -> list[Outcome]:
    """Tune every arm with the first seed, then run it with the others; what `path` has is not run again."""
    first, *others = seeds
    digests = {(arm.setting, arm.method): settings(arm) for arm in arms}
    outcomes = _finished(path, digests)
    # Spawned, not forked: torch does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a", encoding="utf-8") as lines:

        def collect(runs: Iterable[Run]) -> None:
            done = {(each.setting, each.method, each.rate, each.seed) for each in outcomes}
            missing = [each for each in runs if (each.setting, each.method, each.rate, each.seed) not in done]
            for number, outcome in enumerate(pool.imap_unordered(train, missing), 1):
                outcomes.append(outcome)
                digest = digests[outcome.setting, outcome.method]
                lines.write(json.dumps({"settings": digest, **asdict(outcome)}) + "\n")
                lines.flush()
                Console(stderr=True).print(f"{number} of {len(missing)}: {outcome}")

        collect(arm.at(rate, first) for arm in arms for rate in arm.rates)
        collect(arm.at(best(outcomes, arm, first).rate, seed) for arm in arms for seed in others)
    return outcomes


def best(outcomes: Sequence[Outcome], arm: Arm, seed: int) -> Outcome:
    """The run of this seed whose rate did best on the tuning half."""
    mine = [each for each in outcomes if (each.setting, each.method, each.seed) == (arm.setting, arm.method, seed)]
    return max(mine, key=lambda each: each.tuning)


def reported(outcomes: Sequence[Outcome], arm: Arm, seeds: Sequence[int]) -> list[Outcome]:
    """The runs at the chosen rate, one for each seed."""
    rate = best(outcomes, arm, seeds[0]).rate
    mine = [e for e in outcomes if (e.setting, e.method, e.rate) == (arm.setting, arm.method, rate) and e.seed in seeds]
    return sorted(mine, key=lambda each: each.seed)


def interval(scores: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean; infinite of one score.

    >>> round(interval([0.7, 0.8, 0.9]), 3)
    0.248
    """
    if len(scores) < 2:
        return float("inf")
    return float(student.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / np.sqrt(len(scores)))


def settings(arm: Arm) -> str:
    """A digest of what an arm's runs depend on, beside the code and what each run's line has: its rate and seed."""
    from fedloom.core.config.run import load_run

    run = arm.at(1.0, 0)
    # Without defaults: a key that a later version knows changes nothing of a run that does not have it.
    config = load_run(arm.file, run.overrides).model_dump_json(exclude_defaults=True)
    plain = json.dumps([arm.setting, arm.method, arm.head, config])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _finished(path: Path, digests: dict[tuple[str, str], str]) -> list[Outcome]:
    """The runs of earlier starts with the same settings."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):
        path.write_text(text + "\n", "utf-8")  # it was killed while it wrote a line
    found = []
    for line in text.splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            continue  # a line that was not written to its end; its run is made again
        digest = document.pop("settings", None)
        if digest == digests.get((document.get("setting"), document.get("method")), ""):
            found.append(Outcome(**document))
    return found
