"""Metrics of a run as a table that a spreadsheet opens."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import RoundRecord, figures

__all__ = ["CSV"]

COLUMNS = ("round", "clients", "accuracy", "loss", "epsilon", "user_epsilon", "bytes_up", "bytes_down", "seconds")


@dataclass
class CSV:
    """metrics.csv in the run's folder: a line for each round, empty where there is no value.

    Args:
        separator: What stands between two values.
    """

    separator: str = ","

    def open(self, folder: Path, config: RunConfig) -> None:
        """Write the names of the columns, unless the file is there."""
        self._path = folder / "metrics.csv"
        if not self._path.exists():
            self._append(COLUMNS)

    def record(self, record: RoundRecord) -> None:
        """Append one line."""
        values = {"round": record.round, **figures(record)}
        self._append([values.get(name, "") for name in COLUMNS])

    def close(self) -> None:
        """Nothing is left to write."""

    def _append(self, row: Iterable[object]) -> None:
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=self.separator).writerow(row)
