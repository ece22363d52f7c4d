"""A trace of when clients are there and how fast they are, from a CSV file."""

import csv
import math
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fedloom.core.errors import ConfigError

__all__ = ["Session", "read_trace"]

_COLUMNS = {"client", "start_s", "end_s"}


class Session(NamedTuple):
    """A time for which a client is there, in seconds."""

    start_s: float
    end_s: float = math.inf
    step_s: float | None = None
    """Seconds that an optimiser step takes it meanwhile; None is what it takes at other times."""


def read_trace(path: Path, names: Collection[str]) -> dict[str, tuple[Session, ...]]:
    """Each client's sessions by its name, oldest first.

    Lines of other clients are left out, so that one trace serves runs of several sizes.

    Args:
        path: The file, with the columns client, start_s, end_s and perhaps step_s.
        names: The clients.

    Raises:
        ConfigError: It cannot be read, a line is malformed, sessions of a client overlap, or a client has none.
    """
    found: dict[str, list[Session]] = {name: [] for name in names}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, restval="")
            columns = list(lines.fieldnames or ())
            if not _COLUMNS <= set(columns) <= {*_COLUMNS, "step_s"}:
                raise ConfigError(
                    f"virtual_time.trace: {path} has the columns {', '.join(columns) or 'none'}; needed are client, "
                    "start_s, end_s, and step_s where speeds were measured"
                )
            for line in lines:
                if line["client"] in found:
                    found[line["client"]].append(_session(line, f"{path} line {lines.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"virtual_time.trace: {path} cannot be read: {error}; give a CSV file in UTF-8") from error
    return {name: _in_order(name, sessions, path) for name, sessions in found.items()}


def _session(line: dict[str, str], where: str) -> Session:
    try:
        step_s = float(line["step_s"]) if line.get("step_s") else None
        session = Session(float(line["start_s"]), float(line["end_s"] or math.inf), step_s)
    except ValueError as error:
        raise ConfigError(f"virtual_time.trace: {where}: {error}; give seconds as numbers") from error
    if not 0 <= session.start_s < session.end_s or not 0 <= (step_s or 0.0) < math.inf:
        raise ConfigError(
            f"virtual_time.trace: {where} has start_s = {session.start_s:g}, end_s = {session.end_s:g}, step_s = "
            f"{step_s}; needed are 0 <= start_s < end_s, and step_s >= 0 or empty"
        )
    return session


def _in_order(name: str, sessions: list[Session], path: Path) -> tuple[Session, ...]:
    if not sessions:
        raise ConfigError(
            f"virtual_time.trace: {path} has no line for {name!r}, so it would never be there; name clients as the run "
            "does: client-0, client-1 ..., or as the data that were given"
        )
    ordered = sorted(sessions, key=lambda each: each.start_s)
    for before, after in pairwise(ordered):
        if after.start_s < before.end_s:
            raise ConfigError(
                f"virtual_time.trace: {path} has {name!r} there from {after.start_s:g} s on and until "
                f"{before.end_s:g} s at once; sessions of a client must not overlap"
            )
    return tuple(ordered)
