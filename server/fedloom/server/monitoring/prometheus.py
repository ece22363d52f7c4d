"""Numbers for Prometheus, of the coordinator and its run. None of them is about what one client's data say.

docs/observability.md lists them all.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fedloom.core.errors import ConfigError
from fedloom.server.coordinator import Coordinator
from fedloom.server.monitoring.participation import Asked
from fedloom.server.monitoring.recorders.api import RoundRecord
from fedloom.server.monitoring.recorders.background import spent_after
from fedloom.server.privacy.user_ledger import spent as user_spent
from fedloom.server.rounds.state import AdapterCommitted, ClientLost, Event, RoundOpened, SumAccepted, UpdateAccepted

__all__ = ["Metrics"]

_COMMIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROUND_S = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_CALL_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts what it is told from any thread, and asks the coordinator for the rest when it is read.

    Args:
        coordinator: Whose run is counted.
        before: What the log held when it was opened.
        clock: Seconds, never going back; for the duration of rounds.
    """

    def __init__(
        self, coordinator: Coordinator, before: Iterable[Event] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._asked, self._opened_s = clock, Asked(), dict[int, float]()
        for event in before:
            self._asked.add(event)
        registry = self._registry = CollectorRegistry()
        self._rounds = Counter("fedloom_rounds_committed", "Rounds committed by this process.", registry=registry)
        self._round_s = Histogram(
            "fedloom_round_duration_seconds",
            "From the first opening of a round to its commit.",
            buckets=_ROUND_S,
            registry=registry,
        )
        self._accepted = Counter("fedloom_updates_accepted", "Updates accepted.", registry=registry)
        self._rejected = Counter(
            "fedloom_updates_rejected",
            "Uploads that ended in an error, by the class of the error.",
            ["reason"],
            registry=registry,
        )
        self._lost = Counter(
            "fedloom_clients_lost",
            "Clients that a round stopped waiting for: left, lease or rejected.",
            ["reason"],
            registry=registry,
        )
        self._calls = Counter(
            "fedloom_rpc_calls",
            "gRPC calls that are over, by method and status.",
            ["method", "status"],
            registry=registry,
        )
        self._call_s = Histogram(
            "fedloom_rpc_duration_seconds",
            "gRPC calls; Work and Exchange wait for their answer.",
            ["method"],
            buckets=_CALL_S,
            registry=registry,
        )
        self._commit_s = Histogram(
            "fedloom_store_commit_duration_seconds",
            "Transactions of the event log and the audit log.",
            buckets=_COMMIT_S,
            registry=registry,
        )
        self._standing = _Standing(coordinator, self._asked)
        registry.register(self._standing)
        ProcessCollector(registry=registry)

    def answered(self, method: str, status: str, error: str, seconds: float) -> None:
        """A call is over, see `Gate`."""
        self._calls.labels(method, status).inc()
        self._call_s.labels(method).observe(seconds)
        if method == "Submit" and error:
            self._rejected.labels(error).inc()

    def appended(self, events: Sequence[Event], seconds: float) -> None:
        """Events have become durable, see `Store`."""
        self._commit_s.observe(seconds)
        for event in events:
            self._asked.add(event)
            match event:
                case RoundOpened(round=number):
                    self._opened_s.setdefault(number, self._clock())
                case UpdateAccepted():
                    self._accepted.inc()
                case SumAccepted(clients=clients):
                    self._accepted.inc(len(clients))
                case ClientLost(reason=reason):
                    self._lost.labels(reason).inc()
                case AdapterCommitted(round=number):
                    self._rounds.inc()
                    opened_s = self._opened_s.pop(number, None)
                    if opened_s is not None:  # otherwise it was opened by a process before this one
                        self._round_s.observe(self._clock() - opened_s)
                case _:
                    pass

    def record(self, record: RoundRecord) -> None:
        """Remember the newest score, see `Recorder`."""
        if record.accuracy is not None and record.loss is not None:
            self._standing.score = record.accuracy, record.loss
        self._standing.federated = record.federated or self._standing.federated

    def close(self) -> None:
        """Nothing is left to write."""

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


class _Standing(Collector):
    """What is asked when it is read."""

    def __init__(self, coordinator: Coordinator, asked: Asked) -> None:
        self._coordinator, self._asked = coordinator, asked
        self.score: tuple[float, float] | None = None
        self.federated: dict[str, float | None] | None = None

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The families with their values now."""
        now, config = self._coordinator.progress, self._coordinator.config
        down, up = (sum(both[side] for both in now.bytes_by_round.values()) for side in (0, 1))
        yield CounterMetricFamily("fedloom_sent_bytes", "Payload bytes sent to clients in the whole run.", down)
        yield CounterMetricFamily("fedloom_received_bytes", "Payload bytes received from clients in the whole run.", up)
        refused = self._coordinator.audit.refusals
        yield CounterMetricFamily("fedloom_refusals", "Calls and messages refused, see the audit log.", refused)
        yield GaugeMetricFamily("fedloom_clients_live", "Clients whose lease has not lapsed.", len(now.live))
        yield GaugeMetricFamily("fedloom_clients_refusing", "Clients that refuse the run.", len(now.refusing))
        waited = "Seconds for which the run has been waiting for clients that do not come."
        yield GaugeMetricFamily("fedloom_waiting_seconds", waited, now.waiting_s)
        yield GaugeMetricFamily("fedloom_round_updates", "Updates accepted in the open round.", len(now.submitted))
        yield GaugeMetricFamily("fedloom_round_clients", "Clients asked in the open round.", len(now.cohort))
        yield GaugeMetricFamily("fedloom_rounds_done", "Rounds committed in the whole run.", now.round)
        yield GaugeMetricFamily("fedloom_rounds_planned", "Rounds of the whole run.", now.rounds)
        if self.score is not None:
            accuracy, loss = self.score
            yield GaugeMetricFamily("fedloom_held_out_accuracy", "Newest accuracy on held-out rows, 0 to 1.", accuracy)
            yield GaugeMetricFamily("fedloom_held_out_loss", "Newest loss on held-out rows, in nats.", loss)
        for name, value in (self.federated or {}).items():
            if value is not None:
                about = "Newest, by the clients' evaluations together."
                yield GaugeMetricFamily(f"fedloom_federated_{name}", about, value)
        if config.privacy.enabled:
            most = math.inf
            with suppress(ConfigError):
                most = spent_after(config, self._asked.most).epsilon
            yield GaugeMetricFamily("fedloom_epsilon_most", "Epsilon of the client that has spent most.", most)
        if config.user_level.enabled:
            spent = user_spent(config.user_level, now.round)
            yield GaugeMetricFamily("fedloom_epsilon_user_level", "User-level epsilon spent so far.", spent)
