"""Spans of a real run, as an in-memory exporter gets them."""

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedloom.server.monitoring import status as observation
from fedloom.server.monitoring.otel import ENDPOINT, Spans, exporting
from tests.dashboard.stage import config, stage


def test_a_span_for_each_round_and_each_call_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(observation, "exporting", lambda run: Spans(provider, run))

    with stage(tmp_path / "runs", config(rounds=2), expect=2) as live:
        live.join("ann", "ben")
        live.rounds(2)

    spans = exporter.get_finished_spans()
    rounds = [each for each in spans if each.name == "round"]
    assert [dict(each.attributes or {}) for each in rounds] == [
        {"fedloom.run": "ward-notes", "fedloom.round": number + 1, "fedloom.cohort": 2, "fedloom.updates": 2}
        for number in (0, 1)
    ]
    assert all(each.start_time and each.end_time and each.start_time < each.end_time for each in rounds)
    submits = [each for each in spans if each.name.endswith("/Submit")]
    assert {dict(each.attributes or {})["rpc.grpc.status"] for each in submits} == {"OK"}
    inside = {each.context.span_id for each in rounds if each.context}
    first = next(each for each in submits if each.parent is not None)
    assert first.parent is not None
    assert first.parent.span_id in inside


def test_nothing_is_traced_unless_somebody_says_where_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert exporting("trial") is None

    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    spans = exporting("trial")
    assert spans is not None
    spans.close()
