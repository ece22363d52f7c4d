"""The records of a run that a coordinator serves, written beside its work: nobody waits for them."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import GRID, Statement
from fedloom.core.privacy.spends import run_statement
from fedloom.core.schema import Tensors
from fedloom.server.monitoring.participation import Attendance
from fedloom.server.monitoring.recorders.api import RecordWriter, RoundRecord
from fedloom.server.privacy.user_ledger import spent as user_spent
from fedloom.server.rounds.state import AdapterCommitted, Event, RoundOpened

__all__ = ["Recording", "Scorer", "is_scored", "round_record", "spent_after"]

Scorer = Callable[[Tensors], tuple[float, float]]
"""Accuracy and loss, in nats, of an adapter on held-out data. It may take its time, and fail."""

_MOST_WAITING = 8
"""Adapters in memory that wait to be scored."""

_log = logging.getLogger(__name__)


def spent_after(config: RunConfig, rounds: int) -> Statement:
    """What a client has spent in a private run if it trained in so many rounds: never below what its ledger says.

    On the grid of the ledgers: a report's finer one would cost seconds a round.
    """
    return run_statement(config, rounds, GRID)


def is_scored(config: RunConfig, rounds: int) -> bool:
    """Whether the adapter after so many rounds is scored on held-out rows."""
    return rounds % config.evaluation.every == 0 or rounds == config.run.rounds


def round_record(
    config: RunConfig,
    rounds: int,
    seen: Attendance,
    clients: Iterable[str],
    traffic: tuple[int, int],
    seconds: float,
) -> RoundRecord:
    """The record of the round that was committed last, but for its score on held-out rows.

    Args:
        config: The run file, calibrated.
        rounds: How many are committed.
        seen: What the log says up to that commit.
        clients: Whose epsilon is told.
        traffic: Payload bytes (down, up) of the round.
        seconds: Age of the run.

    Raises:
        ConfigError: There is no finite epsilon.
    """
    epsilon, privacy = None, None
    if config.privacy.enabled:
        counts = {client: seen.asked.counts[client] for client in clients}
        spent = {count: spent_after(config, count) for count in sorted(set(counts.values()))}
        epsilon = {client: spent[count].epsilon for client, count in counts.items()}
        privacy = spent[max(spent)].document() if spent else None
    down, up = traffic
    return RoundRecord(
        rounds,
        len(seen.cohort),
        None,
        None,
        epsilon,
        privacy,
        up,
        down,
        round(seconds, 3),
        user_spent(config.user_level, rounds) if config.user_level.enabled else None,
        seen.scores.of(config),
    )


class Recording:
    """Turns events into one record a round, in a thread of its own.

    With a scorer the record of every evaluation.every-th round, and of the last, waits for its score, and so do those
    after it: records are written in the order of the rounds.

    Args:
        config: The run file, calibrated.
        recorders: Where records go. One that fails is left out from then on, with a line in the log.
        traffic: Payload bytes (down, up) by round, from 0.
        before: What the log holds already.
        seconds: Age of the run now, if it had begun before this process; 0 if not.
        score: Scores adapters. One that fails is left out from then on, with a line in the log.
        unscored: Rounds whose adapters are gone: their records wait for no score.
    """

    def __init__(
        self,
        config: RunConfig,
        recorders: Iterable[RecordWriter],
        traffic: Callable[[], dict[int, tuple[int, int]]],
        before: Iterable[Event] = (),
        seconds: float = 0.0,
        score: Scorer | None = None,
        unscored: int = 0,
    ) -> None:
        self._config, self._recorders, self._traffic = config, list(recorders), traffic
        self._attendance = Attendance()
        self._began_s = time.monotonic() - seconds if seconds else None
        for event in before:
            self._attendance.add(event)
        self._score = score
        self._held: deque[RoundRecord] = deque()
        self._adapters: dict[int, Tensors] = {}
        self._judged, self._behind = unscored, False
        self._queue: queue.SimpleQueue[tuple[Sequence[Event], float, float | None] | int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fedloom-records", daemon=True)

    def __enter__(self) -> Self:
        """Begin; leaving the block writes what is left and closes the recorders."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def put(self, events: Sequence[Event], age_s: float | None = None) -> None:
        """Take events that have just become durable, or did at this age of the run. It never waits, in any thread."""
        self._queue.put((events, time.monotonic(), age_s))

    def committed(self, rounds: int, result: Callable[[], Tensors]) -> None:
        """Take what gives the model after so many rounds, whose events have been put before. It never waits."""
        if self._score is None or not is_scored(self._config, rounds):
            return
        if rounds == self._config.run.rounds or len(self._adapters) < _MOST_WAITING:
            self._adapters[rounds] = result()
        self._queue.put(rounds)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, int):
                self._judge(item)
            else:
                self._happened(*item)
            while self._held and not self._awaits_score(self._held[0].round):
                self._write(self._held.popleft())
        for record in self._held:
            self._write(record)
        for recorder in self._recorders:
            self._try(recorder, recorder.close)

    def _happened(self, events: Sequence[Event], now_s: float, told_s: float | None) -> None:
        for event in events:
            self._attendance.add(event)
            if isinstance(event, RoundOpened) and self._began_s is None:
                self._began_s = now_s
            if isinstance(event, AdapterCommitted):
                with suppress(ConfigError):  # there is no finite epsilon, so nothing true to write
                    age_s = now_s - (now_s if self._began_s is None else self._began_s) if told_s is None else told_s
                    traffic = self._traffic().get(event.round, (0, 0))
                    clients = sorted(self._attendance.asked.counts)
                    self._held.append(
                        round_record(self._config, event.round + 1, self._attendance, clients, traffic, age_s)
                    )

    def _awaits_score(self, number: int) -> bool:
        return self._score is not None and number > self._judged and is_scored(self._config, number)

    def _judge(self, number: int) -> None:
        """Score the adapter after so many rounds, and complete its record."""
        accuracy = loss = None
        if number not in self._adapters:
            if not self._behind:
                _log.warning("rounds are faster than scores: round %d has none; raise evaluation.every", number)
            self._behind = True
        elif self._score is not None:
            try:
                accuracy, loss = self._score(self._adapters[number])
            except Exception as error:  # whatever happens there, the run goes on
                _log.error("held-out rows are not scored from round %d on: %s", number, error)
                self._score = None
        self._adapters.pop(number, None)
        self._judged = number
        for index, record in enumerate(self._held):
            if record.round == number:
                self._held[index] = replace(record, accuracy=accuracy, loss=loss)

    def _write(self, record: RoundRecord) -> None:
        for recorder in tuple(self._recorders):
            if not self._try(recorder, partial(recorder.record, record)):
                self._recorders.remove(recorder)

    def _try(self, recorder: RecordWriter, do: Callable[[], None]) -> bool:
        try:
            do()
        except Exception as error:  # whatever another program's package raises
            _log.error("%s fails and is left out from now on: %s", type(recorder).__name__, error)
            return False
        return True
