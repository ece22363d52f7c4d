"""What this client has helped to unmask, on its disk: one list of survivors for one update in one round.

Two sums of the same updates over two lists differ by the updates of whoever is on only one of them. So a client that
has revealed its shares for a list reveals none for another list of that round, also after a restart.
"""

import json
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from fedloom.proto.errors import LedgerError, PolicyError

__all__ = ["remember"]

_FILE = "revealed.db"
_TABLE = """
CREATE TABLE IF NOT EXISTS revealed (
    run TEXT NOT NULL, round INTEGER NOT NULL, what TEXT NOT NULL, PRIMARY KEY (run, round)
) STRICT;
"""


def remember(folder: Path, run: str, round: int, update: str, survivors: Iterable[str]) -> None:
    """Write down, durably, that shares are about to be revealed for this update and these survivors.

    Returning means that they may be. Doing it again with the same update and survivors is allowed.

    Args:
        folder: The client's state folder.
        run: The run's random name.
        round: From 0.
        update: SHA-256 of the update before masking, hex.
        survivors: Names of those whose updates are in the sum.

    Raises:
        PolicyError: Shares were revealed for other survivors, or for another update, in this round before.
        LedgerError: The disk refuses.
    """
    what = json.dumps([update, *sorted(survivors)])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(folder / _FILE, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=FULL")
            db.execute(_TABLE)
            db.execute("INSERT OR IGNORE INTO revealed VALUES (?, ?, ?)", (run, round, what))
            ((known,),) = db.execute("SELECT what FROM revealed WHERE run = ? AND round = ?", (run, round)).fetchall()
        _sync(folder)
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"{folder / _FILE} cannot be written: {error}; no shares are revealed without it") from error
    if known != what:
        raise PolicyError(
            f"round {round + 1} was unmasked before with {len(json.loads(known)) - 1} survivors or another update; "
            "a second sum would tell single updates apart, so this client takes no further part in the round"
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
