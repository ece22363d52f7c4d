"""When a private client's messages leave: at coarse public times, so that how long its work took says little.

How long a client prepares depends on how many rows it has and how long they are, and how long it trains on which of
them were sampled. A message that follows such work waits for the next time of a grid that only the beginning of the
work sets. The steps of the grid grow with the time that has passed, so that the wait costs a bounded share of it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["AT_ONCE", "Pace", "tick"]

_PREPARED_S = 5.0
_TRAINED_S = 1.0
_TRAINED_STEPS = 8


@dataclass(frozen=True)
class Pace:
    """The times of one client.

    Args:
        clock: Seconds, never going back.
        sleep: Sleeps for so many seconds.
        coarse: False never waits: for a coordinator on this machine, which can watch the process itself.
    """

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    coarse: bool = True

    def read(self, begun: float) -> None:
        """Wait once data that were begun to be read at `begun` are read, for 5, 10, 20, 40 ... seconds in all."""
        self._wait(begun, _PREPARED_S, 1)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """A block that reads private data; it lasts 5, 10, 20, 40 ... seconds."""
        with self._lasting(_PREPARED_S, 1):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """A block that trains; it lasts at least a second, and at most an eighth longer than its work."""
        with self._lasting(_TRAINED_S, _TRAINED_STEPS):
            yield

    @contextmanager
    def _lasting(self, first_s: float, steps: int) -> Iterator[None]:
        begun = self.clock()
        try:
            yield
        except Exception:
            self._wait(begun, first_s, steps)  # a process that ends closes its line, which is seen as well
            raise
        self._wait(begun, first_s, steps)

    def _wait(self, begun: float, first_s: float, steps: int) -> None:
        if self.coarse:
            passed = self.clock() - begun
            self.sleep(max(0.0, tick(passed, first_s, steps) - passed))


AT_ONCE = Pace(coarse=False)
"""No waiting."""


def tick(passed_s: float, first_s: float, steps: int) -> float:
    """The first time of the grid that is not before `passed_s`.

    Args:
        passed_s: Seconds since the work began.
        first_s: The earliest time.
        steps: Times of the grid in each doubling of the first.

    >>> [tick(passed, 5.0, 1) for passed in (0.1, 5.0, 5.1, 11.0)]
    [5.0, 5.0, 10.0, 20.0]
    >>> [tick(passed, 1.0, 8) for passed in (0.1, 1.1, 100.0)]
    [1.0, 1.125, 104.0]
    """
    if passed_s <= first_s:
        return first_s
    step = first_s * 2.0 ** math.floor(math.log2(passed_s / first_s)) / steps
    return math.ceil(passed_s / step) * step
