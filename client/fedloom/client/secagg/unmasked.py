"""What this client has helped to unmask, on its disk: one list of survivors for one update in one round.

Two sums of the same updates over two lists differ by the updates of whoever is on only one of them. So a client that
has revealed its shares for a list reveals none for another list of that round, nor for an earlier round, also after
a restart.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedloom.core.errors import LedgerError, PolicyError
from fedloom.core.runtime.durable import make_folder, write_durably

__all__ = ["remember"]

_FOLDER = "revealed"


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
        PolicyError: Shares were revealed for other survivors, for another update, or in a later round before.
        LedgerError: The disk refuses, or what was remembered cannot be read.
    """
    # The coordinator chose the run's name, so it must not become a path.
    path = folder / _FOLDER / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"
    what = [round, update, *sorted(survivors)]
    try:
        known = _read(path) if path.exists() else [-1]
        if known == what:
            return
        if known[0] < round:
            make_folder(path.parent)
            text = json.dumps(what).encode()
            write_durably(path, text, b"\n", hashlib.sha256(text).hexdigest().encode())
            return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LedgerError(f"{path} cannot be read or written: {error}; no shares are revealed without it") from error
    raise PolicyError(
        f"round {round + 1} cannot be unmasked: round {known[0] + 1} was, with {len(known) - 2} survivors or another "
        "update; a second sum would tell single updates apart, so this client takes no further part in the round"
    )


def _read(path: Path) -> list[Any]:
    text, _, digest = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError("its digest does not fit; the file is damaged")
    known: list[Any] = json.loads(text)
    return known
