"""One record a round, for people and their tools: metrics.jsonl, and writers for other programs.

Nothing is ever decided by a record: a run goes on without those that cannot be written.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import tomli_w

from fedloom.core.config.run import RunConfig
from fedloom.core.registry import build

__all__ = [
    "METRICS_FILE",
    "JsonLines",
    "RecordWriter",
    "Recorder",
    "RoundRecord",
    "figures",
    "open_recorders",
    "read_metrics",
    "write_config",
]

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class RoundRecord:
    """One line of metrics.jsonl; round 0 is the starting adapter."""

    round: int
    clients: int
    accuracy: float | None
    """Held-out accuracy, on the rounds that are evaluated."""
    loss: float | None
    epsilon: dict[str, float] | None
    """Epsilon by client so far; None without privacy."""
    privacy: dict[str, Any] | None
    """Statement of the client that has spent most so far: the terms of `epsilon`; None without privacy."""
    bytes_up: int
    bytes_down: int
    seconds: float
    """Since the start of the first round."""
    user_epsilon: float | None = None
    """Epsilon of a whole client so far, by the coordinator's noise; None without user-level privacy."""
    federated: dict[str, float | None] | None = None
    """What the clients' own evaluations say of the adapter that this round started from, see `federated_score`."""
    metrics: dict[str, float] | None = None
    """Further held-out metrics of the run's task, by name."""
    virtual_seconds: float | None = None
    """When the round was committed in virtual time; None in a run that has none."""


class RecordWriter(Protocol):
    """Takes every record of a run, in the order of the rounds."""

    def record(self, record: RoundRecord) -> None:
        """Write one record; it can be seen when the call returns."""

    def close(self) -> None:
        """Write what is left. No more records come."""


class Recorder(RecordWriter, Protocol):
    """A writer for another program, of the entry-point group `fedloom.recorders`."""

    def open(self, folder: Path, config: RunConfig) -> None:
        """Begin, or go on with a run that was recorded here before: what is there stays.

        Args:
            folder: The run's folder, which exists.
            config: The run file.
        """


class JsonLines:
    """metrics.jsonl in a run folder, one record a line; what is there already stays."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE

    def record(self, record: RoundRecord) -> None:
        """Append one line."""
        with self._path.open("a+b") as file:
            if file.tell() > 0:  # a process that died in the middle of a line must not spoil this one
                file.seek(-1, 2)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(asdict(record)).encode() + b"\n")

    def close(self) -> None:
        """Nothing is left to write."""


def open_recorders(folder: Path, config: RunConfig, report_to: tuple[str, ...]) -> list[RecordWriter]:
    """metrics.jsonl in the run folder, and the recorders that were asked for by name.

    Raises:
        ConfigError: One is not installed, or a package that it needs.
    """
    named: list[Recorder] = [build("recorders", name, {}) for name in dict.fromkeys(report_to)]
    for recorder in named:
        recorder.open(folder, config)
    return [JsonLines(folder), *named]


def figures(record: RoundRecord) -> dict[str, float]:
    """The numbers of a record by name; of the clients' epsilons the largest alone."""
    found: dict[str, float | None] = {
        "accuracy": record.accuracy,
        "loss": record.loss,
        "epsilon": max(record.epsilon.values(), default=None) if record.epsilon else None,
        "user_epsilon": record.user_epsilon,
        "clients": record.clients,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
        "virtual_seconds": record.virtual_seconds,
        **(record.metrics or {}),
        **{f"federated_{name}": value for name, value in (record.federated or {}).items()},
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def read_metrics(folder: Path) -> list[RoundRecord]:
    """Every whole line of metrics.jsonl."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    records = []
    for line in lines:
        try:
            records.append(RoundRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # cut off when a process died, or of another version
    return records


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the effective run file, which runs again as it is."""
    tables = config.model_dump(mode="json", exclude_none=True)
    (folder / "run.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
