"""What a run tells its callbacks before its first round and after each, and how one of them ends it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.server.monitoring.recorders.api import RoundRecord, figures
from fedloom.simulation.run_folder import metrics_frame

if TYPE_CHECKING:
    import pandas

__all__ = ["SoFar", "StopRun"]


class StopRun(Exception):  # it is no error
    """Raised by a callback to end the run with the rounds that are committed."""


@dataclass(frozen=True)
class SoFar:
    """A run after a round, or before the first.

    Of the clients' rows it holds nothing that has not left them with the run's noise. Figures of the held-out rows are
    exact.
    """

    folder: Path
    """The run folder."""
    records: tuple[RoundRecord, ...]
    """One for each round so far, the newest last; round 0 is the starting adapter."""
    save_adapter: Callable[[Path], None]
    """Write the adapter of this round to a folder, as a PEFT adapter; what a client keeps to itself is not in it."""

    @property
    def round(self) -> int:
        """Rounds committed so far."""
        return self.records[-1].round

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy, 0 to 1; None in rounds that are not evaluated."""
        return self.records[-1].accuracy

    @property
    def loss(self) -> float | None:
        """Held-out loss in nats; None in rounds that are not evaluated."""
        return self.records[-1].loss

    @property
    def epsilon(self) -> float | None:
        """The most that a client has spent so far; None without privacy."""
        return max((self.records[-1].epsilon or {}).values(), default=None)

    @property
    def epsilon_by_client(self) -> dict[str, float]:
        """What each client has spent so far, by name; empty without privacy and before the first round."""
        return dict(self.records[-1].epsilon or {})

    @property
    def figures(self) -> dict[str, float]:
        """The round's numbers by name, for a logger: accuracy, loss, epsilon, bytes_up, the task's own metrics ..."""
        return figures(self.records[-1])

    @property
    def metrics(self) -> "pandas.DataFrame":
        """The records as a table, see `metrics_frame`."""
        return metrics_frame(self.records)
