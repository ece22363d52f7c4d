"""Long polls that wait: kept alive together, and asked again together when something has happened.

Thousands may wait while a round that opens concerns a few. So a poll that still has to wait costs one call of the
coordinator in a batch of many, and its own task does not even wake. For so many that even this is too much, those who
ask for work are told when to come back: within their lease, so that they are drawn like those who wait.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fedloom.core.errors import ProtocolError, StoreError, StrategyError
from fedloom.core.limits import LONG_POLL_S
from fedloom.server.rpc.load_shedding import Lane

__all__ = ["Asked", "Polls"]

Asked = tuple[str, str, int]
"""The client, run and epoch a poll is from and to."""

_BATCH = 50
"""Polls asked again in one go. Other calls come in between."""

_MOST_WAITING = 4096
"""Polls that wait at the same time: twice as many clients as `fedloom bench clients` holds."""

T = TypeVar("T")


@dataclass(eq=False)
class _Poll:
    """One that waits, and where its answer goes."""

    asked: Asked
    call: Callable[[], Any]
    waits: Callable[[Any], bool]
    answer: "asyncio.Future[Any]"


class Polls:
    """All waiting polls of one event loop, in which it must be made.

    Args:
        lane: Where the coordinator is called.
        renew: Keeps a client's lease; may raise ProtocolError.
        every_s: How often, in seconds; also the longest time that anybody is told to stay away.
    """

    def __init__(self, lane: Lane, renew: Callable[[str, str, int], object], every_s: float) -> None:
        self._lane, self._renew, self._every_s = lane, renew, every_s
        self._waiting: set[_Poll] = set()
        self._stirs, self._stirred = 0, asyncio.Event()
        self._tasks = [asyncio.create_task(work) for work in (self._ask_again(), self._keep_alive(every_s))]

    async def poll(
        self,
        asked: Asked,
        call: Callable[[], T],
        waits: Callable[[T], bool],
        later: Callable[[float], T] | None = None,
    ) -> T:
        """The first answer with which the caller need not wait, or whatever there is at the end of a long poll.

        Args:
            asked: Who asks.
            call: Asks the coordinator.
            waits: Whether an answer is one to wait with.
            later: Makes the answer "come back after so many seconds", given at once when too many are waiting. None
                lets the poll wait all the same.
        """
        again = False
        while True:
            stirs = self._stirs  # noted before asking: after the answer it may already be out of date
            answer = await self._lane.run(call, always=again)
            if not waits(answer):
                return answer
            if stirs == self._stirs:
                if later is not None and len(self._waiting) >= _MOST_WAITING:
                    # Jittered, so that a crowd that is sent away together does not come back together.
                    return later(random.uniform(0.5, 1.0) * self._every_s)
                return await self._wait(_Poll(asked, call, waits, asyncio.get_running_loop().create_future()), answer)
            again = True

    def stir(self) -> None:
        """Something has happened: answers may be different now."""
        self._stirs += 1
        self._stirred.set()

    def close(self) -> None:
        """Ask nobody any more."""
        for task in self._tasks:
            task.cancel()

    async def _wait(self, poll: _Poll, answer: T) -> T:
        self._waiting.add(poll)
        try:
            # Clients that came at the same time, after a restart or at a round's end, are not to stay in step.
            async with asyncio.timeout(random.uniform(0.75, 1.0) * LONG_POLL_S):
                found: T = await poll.answer
                return found
        except TimeoutError:
            return answer
        finally:
            self._waiting.discard(poll)

    async def _ask_again(self) -> None:
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            polls = list(self._waiting)
            for start in range(0, len(polls), _BATCH):
                batch = [poll for poll in polls[start : start + _BATCH] if not poll.answer.done()]
                for poll, answer in zip(batch, await self._lane.run(partial(_asked, batch), always=True), strict=True):
                    if poll.answer.done():
                        continue  # its line broke meanwhile, or its time was over
                    if isinstance(answer, Exception):
                        poll.answer.set_exception(answer)
                    elif not poll.waits(answer):
                        poll.answer.set_result(answer)

    async def _keep_alive(self, every_s: float) -> None:
        def renew(waiting: set[Asked]) -> None:
            for each in waiting:
                with suppress(ProtocolError):
                    self._renew(*each)

        while True:
            await asyncio.sleep(every_s)
            with suppress(StoreError, StrategyError):  # the next tick meets it too, and stops the server
                await self._lane.run(partial(renew, {poll.asked for poll in self._waiting}), always=True)


def _asked(polls: list[_Poll]) -> list[Any]:
    """What each gets now: an answer, or the error that takes its place."""
    answers: list[Any] = []
    for poll in polls:
        try:
            answers.append(poll.call())
        except Exception as error:
            answers.append(error)
    return answers
