"""How much the coordinator takes on: what one client may ask, what waits for a thread, and when to come back."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fedloom.core.errors import Overloaded
from fedloom.core.limits import MAX_NAME_LENGTH

__all__ = ["CLIENT_BURST", "CLIENT_CALLS", "CLIENT_CALLS_PER_S", "Clients", "Lane"]

CLIENT_CALLS = 16
"""Most calls of one client at the same time; an honest one makes two, and leaves a few behind on broken lines."""

CLIENT_CALLS_PER_S = 200.0
"""Most calls a client makes a second in the long run; rounds without any training take about a hundred."""

CLIENT_BURST = 400.0
"""Calls it may make at once after a quiet time."""

_LEAST_WAIT_S = 0.1
_MOST_WAIT_S = 10.0
"""Longest wait that anybody is told. A third of the usual lease, so that nobody is lost for doing as told."""
_MOST_KNOWN = 20_000
_START_S = 0.01
_RECENT = 0.1
"""What the mean time of a call is before the first, and the weight of the latest in it."""

T = TypeVar("T")


@dataclass
class _Client:
    """One client's calls under way, and how many more it may make now."""

    calls: int
    left: float
    seen_s: float


class Clients:
    """Keeps any one client from taking everything. For one event loop.

    Args:
        clock: Seconds from any origin, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Client] = {}

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """One call by the client of this name, from its beginning to its end.

        Raises:
            Overloaded: It makes too many at a time or too many a second.
        """
        name, now_s = name[:MAX_NAME_LENGTH], self._clock()
        client = self._known.get(name)
        if client is None:
            self._forget(now_s)
            client = self._known[name] = _Client(0, CLIENT_BURST, now_s)
        client.left = min(CLIENT_BURST, client.left + CLIENT_CALLS_PER_S * (now_s - client.seen_s))
        client.seen_s = now_s
        if client.calls >= CLIENT_CALLS:
            raise Overloaded(f"{client.calls} calls of this client are under way; let them end first")
        if client.left < 1:
            raise Overloaded(f"this client makes more than {CLIENT_CALLS_PER_S:g} calls a second; make fewer")
        client.left -= 1
        client.calls += 1
        try:
            yield
        finally:
            client.calls -= 1

    def _forget(self, now_s: float) -> None:
        """Make room for one more name: a peer can make up as many as it likes."""
        if len(self._known) < _MOST_KNOWN:
            return
        rested_s = now_s - CLIENT_BURST / CLIENT_CALLS_PER_S
        busy = {name: each for name, each in self._known.items() if each.calls or each.seen_s > rested_s}
        if len(busy) >= _MOST_KNOWN:
            raise Overloaded(f"{len(busy)} clients are calling; come back later", _MOST_WAIT_S)
        self._known = busy


class Lane:
    """Threads for one kind of work, before which only so much of it waits.

    What is refused is told when to come back. These times are handed out one after the other, as far apart as calls
    have taken lately, so that those who come back find room and do not all come at once.

    Args:
        name: Of the threads.
        threads: How many calls are done at the same time.
        waiting: Most calls that wait for a thread.
    """

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._threads, self._most = threads, threads + waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._calls, self._mean_s, self._promised_s = 0, _START_S, 0.0

    async def run(self, function: Callable[[], T], *, always: bool = False) -> T:
        """Call the function in a thread, so that no disk, lock or sum stalls the loop.

        Args:
            function: What to call.
            always: Take it on however much is waiting.

        Raises:
            Overloaded: Too much is waiting.
        """
        loop = asyncio.get_running_loop()
        if self._calls >= self._most and not always:
            raise Overloaded("the coordinator has too much to do; come back later", self._come_back(loop.time()))
        self._calls += 1
        try:
            return await loop.run_in_executor(self._pool, self._timed, function)
        finally:
            self._calls -= 1

    def close(self) -> None:
        """Wait for the calls under way, and take no more."""
        self._pool.shutdown()

    def _timed(self, function: Callable[[], T]) -> T:
        began_s = time.monotonic()
        try:
            return function()
        finally:
            self._mean_s += _RECENT * (time.monotonic() - began_s - self._mean_s)

    def _come_back(self, now_s: float) -> float:
        """Seconds after which there should be room for one more."""
        each_s = self._mean_s / self._threads
        self._promised_s = max(self._promised_s, now_s + _LEAST_WAIT_S + self._calls * each_s) + each_s
        if self._promised_s - now_s < _MOST_WAIT_S:
            return self._promised_s - now_s
        self._promised_s = now_s + _MOST_WAIT_S
        return random.uniform(_MOST_WAIT_S / 2, _MOST_WAIT_S)
