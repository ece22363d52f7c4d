"""Spans for OpenTelemetry: one for each round, and one for each gRPC call, inside the round it came in."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.server.rounds.state import AdapterCommitted, Event, RoundClosed, RoundOpened

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

__all__ = ["ENDPOINT", "Spans", "exporting"]

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""Without this variable nothing is traced."""


class Spans:
    """Makes spans of what a coordinator is told; any thread may call it.

    Args:
        provider: Where spans go.
        run: Name of the run, on every round's span.
    """

    def __init__(self, provider: "TracerProvider", run: str) -> None:
        self._provider, self._run = provider, run
        self._tracer = provider.get_tracer("fedloom")
        self._round: Span | None = None

    def answered(self, method: str, status: str, error: str, seconds: float) -> None:
        """A call is over, see `Gate`."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        end_ns = time.time_ns()
        span = self._tracer.start_span(
            f"fedloom.v1.Federation/{method}",
            set_span_in_context(self._round) if self._round else None,
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.method": method, "rpc.grpc.status": status, "error.type": error},
            start_time=end_ns - round(1e9 * seconds),
        )
        span.end(end_ns)

    def appended(self, events: Sequence[Event], seconds: float) -> None:
        """Events have become durable, see `Store`."""
        for event in events:
            if isinstance(event, RoundOpened) and self._round is None:
                about: dict[str, str | int] = {
                    "fedloom.run": self._run,
                    "fedloom.round": event.round + 1,
                    "fedloom.cohort": len(event.cohort),
                }
                self._round = self._tracer.start_span("round", attributes=about)
            elif isinstance(event, RoundClosed) and self._round is not None:
                self._round.set_attribute("fedloom.updates", len(event.clients))
            elif isinstance(event, AdapterCommitted) and self._round is not None:
                self._round.end()
                self._round = None

    def close(self) -> None:
        """End what is open and send what is left."""
        if self._round is not None:
            self._round.end()
        self._provider.shutdown()


def exporting(run: str) -> Spans | None:
    """Spans that are sent to where OTEL_EXPORTER_OTLP_ENDPOINT says; None where it or the package is missing."""
    if not os.environ.get(ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": "fedloom"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider, run)
