"""The coordinator's clock: time in which it hears nobody counts against nobody."""

import time
from collections.abc import Callable

__all__ = ["Attentive"]


class Attentive:
    """Seconds in which somebody looked at the clock often enough, from any origin.

    A coordinator looks at it a few times per lease. It cannot while it commits a large adapter, or while its process or
    its machine is stopped; the signs of life that came meanwhile are then still to be read. So between two looks at
    most `longest_s` pass.

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
