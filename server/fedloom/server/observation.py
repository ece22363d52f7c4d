"""What a running coordinator tells those who watch it, and what they may tell it: stop."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from fedloom.server.coordinator import Coordinator
from fedloom.server.metrics import Metrics
from fedloom.server.recording import Recording, Scorer
from fedloom.server.records import ReportTo, open_recorders, read_metrics
from fedloom.server.rounds import AdapterCommitted, Event
from fedloom.server.store import Store
from fedloom.server.tracing import Spans, exporting
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
    report_to: tuple[ReportTo, ...] = (),
    score: Scorer | None = None,
) -> Iterator[Observation]:
    """Watch a coordinator for the length of a `with` block: metrics, records in the run folder, traces.

    Args:
        coordinator: Not served yet.
        store: Its state; the hook `appended` is taken over.
        folder: The run folder, for metrics.jsonl and others.
        report_to: Programs that get every record too.
        score: Scores adapters on held-out data; `Observation.committed` must then hear of every commit.

    Raises:
        ConfigError: A package is missing.
        StoreError: The log cannot be read.
    """
    before = store.events()
    written, seconds = 0, 0.0
    with suppress(OSError, IndexError):
        last = read_metrics(folder)[-1]
        written, seconds = last.round, last.seconds
    # A process that was killed while it scored has left the newest adapter without a record.
    begun = _unrecorded(before, written) if score else len(before)
    spans = exporting(coordinator.config.run.name)
    metrics = Metrics(coordinator, before)
    recording = Recording(
        coordinator.config,
        [*open_recorders(folder, coordinator.config, report_to), metrics],
        lambda: dict(coordinator.progress.bytes_by_round),
        before[:begun],
        seconds,
        score,
    )
    observation = Observation(coordinator, metrics, recording, spans)
    try:
        with recording:
            if before[begun:]:
                recording.put(before[begun:])
                recording.committed(coordinator.progress.round, coordinator.result)
            store.appended = observation.appended
            yield observation
            store.appended = lambda events, seconds: None
    finally:
        if spans is not None:
            spans.close()


def _unrecorded(events: Sequence[Event], written: int) -> int:
    """Where the newest commit stands in the log, if its round has no record; else the log's length."""
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        if isinstance(event, AdapterCommitted):
            return index if event.round + 1 > written else len(events)
    return len(events)
