"""Who is who among containers that are all started alike.

The coordinator's side offers slots: names, each with a join token. A container takes a slot by locking the slot's
folder for as long as it runs, so no two ever have one name, one partition or one ledger. Key, data, ledger and outbox
lie in that folder: whoever has the slot is that client, be it the same container, started again, or one that was
made anew.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from fedloom.core.errors import ConfigError
from fedloom.core.runtime.durable import make_folder, write_durably

__all__ = ["take_seat"]

_LOCK, _HOLDER = "lock", "holder"


def take_seat(folder: Path, names: Sequence[str], holder: str) -> str | None:
    """Lock one of the slots for the life of this process and of those it becomes by `exec`.

    A container comes back to the slot it had; otherwise it gets one that nobody has had, and only then one that
    another has left.

    Args:
        folder: Where the slots' folders lie, on a file system of this machine.
        names: The slots.
        holder: Who asks: the container's own name, which it keeps when it is started again.

    Returns:
        The slot's name; None when all are taken.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def order(name: str) -> int:
        path = folder / name / _HOLDER
        had = path.read_text(encoding="utf-8") if path.exists() else ""
        return 0 if had == holder else 2 if had else 1

    try:
        for name in sorted(names, key=order):
            make_folder(folder / name)
            handle = os.open(folder / name / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            os.set_inheritable(handle, True)
            write_durably(folder / name / _HOLDER, holder.encode())
            return name
    except OSError as error:
        raise ConfigError(f"cannot take a slot in {folder}: {error}; let this user write there") from error
    return None
