"""The coordinator's clock: time in which it hears nobody counts against nobody."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

__all__ = ["Attentive", "Busy"]


class Attentive:
    """Seconds in which somebody looked at the clock often enough, from any origin.

    A coordinator looks at it a few times per lease. It cannot while its process or its machine is stopped; the signs of
    life that came meanwhile are then still to be read. So between two looks at most `longest_s` pass, and what is
    skipped does not pass at all.

    Args:
        longest_s: Longest step, in seconds: more than the pause between two looks, and less than a lease.
        clock: Seconds, never going back.
    """

    def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s, self._clock = longest_s, clock
        self._last_s, self._now_s = clock(), 0.0

    def __call__(self) -> float:
        """The time now."""
        last_s, self._last_s = self._last_s, self._clock()
        self._now_s += min(self._last_s - last_s, self._longest_s)
        return self._now_s

    def skip(self) -> None:
        """What has passed since the last look is not counted."""
        self._last_s = self._clock()


class Busy:
    """A lock that one thread may take several times. While it is held, signs of life wait for it: see `released`.

    Args:
        released: Called just before others may have it.
    """

    def __init__(self, released: Callable[[], None]) -> None:
        self._lock, self._depth, self._released = threading.RLock(), 0, released

    def __enter__(self) -> None:
        """Wait for it and take it."""
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give it back."""
        self._depth -= 1
        if not self._depth:
            self._released()
        self._lock.release()
