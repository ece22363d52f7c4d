"""Memory of a script and of all processes that come of it, found by a mark in their environment."""

import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["MARK", "Sampler", "end_leftovers", "processes"]

MARK = "PEERS_MARK"
"""Environment variable by whose value the processes of one script are known, whoever their parent is by now."""

_EVERY_S = 1.0


class Sampler(threading.Thread):
    """Looks once a second while it is entered. Shared pages count in parts (PSS), so that forks are not counted twice.

    Needs Linux; elsewhere it sees nothing.
    """

    def __init__(self, mark: str, server: str) -> None:
        """`mark`: value of `MARK`. `server`: pattern of the command lines of the server's own processes."""
        super().__init__(daemon=True)
        self._mark, self._server = mark, server
        self._over = threading.Event()
        self._samples: list[tuple[float, int, int]] = []
        self._strangers: set[int] = set()

    def __enter__(self) -> "Sampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until it is over."""
        while not self._over.wait(_EVERY_S):
            found = [(_command(process), _pss_kib(process)) for process in self._mine()]
            server = sum(size for command, size in found if self._server and re.search(self._server, command))
            self._samples.append((time.time(), sum(size for _, size in found), server))

    def _mine(self) -> list[int]:
        """The processes with the mark. It is inherited from birth, so that who is a stranger once remains one."""
        alive = _all()
        self._strangers &= alive
        found = [process for process in alive - self._strangers if _has(process, self._mark)]
        self._strangers |= alive - set(found)
        return found

    def peaks_mib(self, until: float) -> tuple[float, float]:
        """The most that all processes had together, and the server's, up to a time in seconds since 1970."""
        seen = [(everything, server) for moment, everything, server in self._samples if moment <= until]
        return tuple(max(column) / 1024 for column in zip(*seen, strict=True)) if seen else (0.0, 0.0)


def processes(mark: str) -> list[int]:
    """Numbers of the processes that have this mark."""
    return [process for process in _all() if _has(process, mark)]


def end_leftovers(mark: str) -> None:
    """Kill what a script that has ended has left."""
    for process in processes(mark):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _all() -> set[int]:
    return {int(folder.name) for folder in Path("/proc").glob("[0-9]*")}


def _has(process: int, mark: str) -> bool:
    with suppress(OSError):
        return f"{MARK}={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return False


def _command(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _pss_kib(process: int) -> int:
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
        return int(found[1]) if found else 0
    return 0
