"""Whose turn it is: of the clients that may have something to do, the one that is expected to take longest.

Longest first keeps the last actor of a round from beginning a long piece when all others are done (Graham 1969: at most
4/3 of the shortest time possible).
"""

import heapq
import threading
from collections.abc import Mapping

__all__ = ["Turns"]


class Turns:
    """The clients that are not done yet, for several threads.

    Args:
        declared: Number of examples that each client declares: what it is taken to cost before it is known.
    """

    def __init__(self, declared: Mapping[str, int]) -> None:
        self._declared, self._seconds = dict(declared), dict[str, float]()
        self._moved = threading.Condition()
        self._ready: list[tuple[float, str]] = []
        self._waiting, self._taken, self._stirs = set(declared), dict[str, int](), 0
        self._error: BaseException | None = None
        self._over = False
        self.stir()

    def take(self) -> str | None:
        """The client whose turn it is, once there is one; None when there is nothing to do any more."""
        with self._moved:
            while not self._ready:
                if self._over or not (self._waiting or self._taken):
                    return None
                self._moved.wait()
            if self._over:
                return None
            _, name = heapq.heappop(self._ready)
            self._taken[name] = self._stirs
            return name

    def give(self, name: str, *, done: bool, waits: bool, seconds: float | None) -> None:
        """A client's turn is over.

        Args:
            name: The client.
            done: Whether its run is over.
            waits: Whether it has nothing to do until something happens.
            seconds: How long its last round took; None before the first.
        """
        with self._moved:
            stirs = self._taken.pop(name)
            if seconds is not None:
                self._seconds[name] = seconds
            if not done:
                self._waiting.add(name)
                if not waits or stirs != self._stirs:  # what it was told may be out of date
                    self._wake([name])
            self._moved.notify_all()

    def stir(self) -> None:
        """Something has happened, so that those who wait may have something to do."""
        with self._moved:
            self._stirs += 1
            self._wake(list(self._waiting))

    def fail(self, error: BaseException) -> None:
        """End it all with an error."""
        with self._moved:
            self._error = self._error or error
        self.close()

    def close(self) -> None:
        """Nobody has a turn any more."""
        with self._moved:
            self._over = True
            self._moved.notify_all()

    def goes_on(self, patience_s: float) -> bool:
        """Whether there are clients that are not done, after so many seconds or as soon as there are none.

        Raises:
            BaseException: What `fail` was told.
        """
        with self._moved:
            self._moved.wait_for(lambda: self._over or not self._left, patience_s)
            if self._error is not None:
                raise self._error
            return bool(self._left)

    @property
    def _left(self) -> bool:
        return bool(self._ready or self._waiting or self._taken)

    def _wake(self, names: list[str]) -> None:
        for name in names:
            self._waiting.discard(name)
            heapq.heappush(self._ready, (-self._cost(name), name))
        if names:
            self._moved.notify_all()

    def _cost(self, name: str) -> float:
        """Seconds that a turn of this client is expected to take; before anybody's is known, in examples."""
        if name in self._seconds:
            return self._seconds[name]
        known = sum(self._declared[each] for each in self._seconds)
        return self._declared[name] * (sum(self._seconds.values()) / known if known else 1.0)
