"""The committed rounds of a run as CSV, for a spreadsheet. No peer wrote any of it, so none can make it a formula."""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fedloom.server.monitoring.recorders.api import RoundRecord

__all__ = ["HEADS", "rounds_csv"]

HEADS = (
    *("round", "committed_at", "seconds", "closed_by", "updates", "lost", "bytes_up", "bytes_down"),
    *("accuracy", "loss", "epsilon_most"),
)


def rounds_csv(past: Sequence[dict[str, Any]], records: Sequence[RoundRecord]) -> str:
    """One line a round, oldest first; empty where a figure is not known.

    Args:
        past: The committed rounds, see `past_rounds`, newest first.
        records: What metrics.jsonl has.
    """
    scored = {each.round: each for each in records}
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(HEADS)
    for each in reversed(past):
        record = scored.get(each["round"])
        lines.writerow(
            [
                *(each["round"], _at(each["done_s"]), _rounded(each["took_s"]), each["reason"]),
                *(each["clients"], each["lost"], each["up"], each["down"]),
                *((record.accuracy, record.loss, _most(record)) if record else (None, None, None)),
            ]
        )
    return text.getvalue()


def _at(at_s: float | None) -> str:
    return "" if at_s is None else datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _most(record: RoundRecord) -> float | None:
    return max(record.epsilon.values(), default=None) if record.epsilon else None
