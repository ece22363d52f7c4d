"""What a running coordinator tells those who watch it, and what they may tell it: stop."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.otel import Spans, exporting
from fedloom.server.monitoring.prometheus import Metrics
from fedloom.server.monitoring.recorders.api import open_recorders, read_metrics
from fedloom.server.monitoring.recorders.background import Recording, Scorer
from fedloom.server.rounds.state import AdapterCommitted, Event, RoundOpened
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State

__all__ = ["Observation", "observing"]

_log = logging.getLogger(__name__)


class Observation:
    """Hands on what the coordinator's hooks say. A watcher that fails is logged, and the run goes on.

    Args:
        coordinator: Whose run it is.
        metrics: Counts.
        recording: Writes records.
        spans: Traces, if there is somewhere to send them.

    Attributes:
        metrics: Counts.
        stop: Stops the server as SIGTERM does, from any thread; None while none serves.
    """

    def __init__(
        self, coordinator: Coordinator, metrics: Metrics, recording: Recording, spans: Spans | None = None
    ) -> None:
        self.metrics, self._coordinator = metrics, coordinator
        self.stop: Callable[[], None] | None = None
        self._recording = recording
        self._watchers: list[Metrics | Spans] = [metrics] if spans is None else [metrics, spans]

    def answered(self, method: str, status: str, error: str, seconds: float) -> None:
        """A call is over, see `Gate`."""
        for watcher in self._watchers:
            with _going_on():
                watcher.answered(method, status, error, seconds)

    def appended(self, events: Sequence[Event], seconds: float) -> None:
        """Events have become durable, see `Store`."""
        self._recording.put(events)
        for watcher in self._watchers:
            with _going_on():
                watcher.appended(events, seconds)

    def committed(self, rounds: int, state: State) -> None:
        """A round's adapter is there, see `Coordinator.on_commit`; it is scored if somebody can."""
        self._recording.committed(rounds, partial(self._coordinator.result, state))


@contextmanager
def _going_on() -> Iterator[None]:
    """A run does not stop because somebody who watches it fails."""
    try:
        yield
    except Exception:
        _log.exception("what happens in the run could not be counted or traced")


@contextmanager
def observing(
    coordinator: Coordinator,
    store: Store,
    folder: Path,
    report_to: tuple[str, ...] = (),
    score: Scorer | None = None,
) -> Iterator[Observation]:
    """Watch a coordinator for the length of a `with` block: metrics, records in the run folder, traces.

    Args:
        coordinator: Not served yet.
        store: Its state; the hook `appended` is taken over.
        folder: The run folder, for metrics.jsonl and others.
        report_to: Names of recorders that get every record too.
        score: Scores adapters on held-out data; `Observation.committed` must then hear of every commit.

    Raises:
        ConfigError: A package is missing.
        StoreError: The log cannot be read.
    """
    before, times = store.events(), store.times()
    began_s = next(
        (times.get(number) for number, event in enumerate(before, 1) if isinstance(event, RoundOpened)), None
    )
    written, told_s = 0, 0.0
    with suppress(OSError, IndexError):
        last = read_metrics(folder)[-1]
        written, told_s = last.round, last.seconds

    def age_s(at_s: float | None) -> float | None:
        """Never below the last record's: a clock that was set back makes no run younger."""
        return None if at_s is None or began_s is None else max(told_s, at_s - began_s)

    begun = _unrecorded(before, times, written)
    spans = exporting(coordinator.config.run.name)
    metrics = Metrics(coordinator, before)
    recording = Recording(
        coordinator.config,
        [*open_recorders(folder, coordinator.config, report_to), metrics],
        lambda: dict(coordinator.progress.bytes_by_round),
        before[:begun],
        age_s(time.time()) or told_s,
        score,
        max(0, coordinator.progress.round - 1),
    )
    observation = Observation(coordinator, metrics, recording, spans)
    try:
        with recording:
            for number, event in enumerate(before[begun:], begun + 1):
                recording.put([event], age_s(times.get(number)))
            if begun < len(before):
                recording.committed(coordinator.progress.round, coordinator.result)
            store.appended = observation.appended
            yield observation
            store.appended = lambda events, seconds: None
    finally:
        if spans is not None:
            spans.close()


def _unrecorded(events: Sequence[Event], times: Mapping[int, float], written: int) -> int:
    """Index of the first commit whose record a killed process still owed; the log's length if there is none.

    One whose time is not known, of an earlier build, stays without: what would be written of it is not true.
    """
    for index, event in enumerate(events):
        if isinstance(event, AdapterCommitted) and event.round + 1 > written and index + 1 in times:
            return index
    return len(events)
