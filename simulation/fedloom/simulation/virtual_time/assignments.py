"""What came of every assignment, for people: assignments.csv in the run folder."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TextIO

__all__ = ["ASSIGNMENTS_FILE", "Assignments", "Outcome", "Work"]

ASSIGNMENTS_FILE = "assignments.csv"

Outcome = Literal["counted", "refused", "over", "dropped", "away", "declined"]
"""counted: the update is in a round. refused: it came, and was not taken. over: the round closed before it was there.
dropped: the client fell silent. away: its session ended. declined: its policy or ledger forbids the work, which was not
charged; any other was, in a private run."""

_ENDING = ("end_s", "outcome", "staleness")


@dataclass(frozen=True)
class Work:
    """An assignment that a client has begun. Times in seconds."""

    client: str
    round: int
    """Counted from 1."""
    start_s: float
    download_s: float
    training_s: float
    upload_s: float

    @property
    def due_s(self) -> float:
        """When its update has arrived, if it does."""
        return self.start_s + self.download_s + self.training_s + self.upload_s


class Assignments:
    """Writes a line when an assignment ends; those under way at the end of the run have none.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file: TextIO = (folder / ASSIGNMENTS_FILE).open("w", encoding="utf-8", newline="")
        self._lines = csv.DictWriter(self._file, [*Work.__dataclass_fields__, *_ENDING])
        self._lines.writeheader()

    def ended(self, work: Work, end_s: float, outcome: Outcome, staleness: int | None = None) -> None:
        """One more line.

        Args:
            work: The assignment.
            end_s: When it ended.
            outcome: How.
            staleness: Of an update that counts, the rounds committed since its start.
        """
        times = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(work).items()}
        self._lines.writerow({**times, "end_s": round(end_s, 6), "outcome": outcome, "staleness": staleness})

    def __enter__(self) -> Self:
        """The open file."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close it."""
        self._file.close()
