"""Records whose rounds are scored on held-out data, by somebody who takes time and may fail."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.server.monitoring.recorders.api import JsonLines, RoundRecord, read_metrics
from fedloom.server.monitoring.recorders.background import Recording
from fedloom.server.monitoring.status import observing
from fedloom.server.rounds.state import AdapterCommitted, Event, RoundOpened
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State

SCHEMA = Schema((TensorSpec("A", "m", Role.HEAD, (1,)),))


class Kept:
    """Keeps records."""

    def __init__(self) -> None:
        self.records = list[RoundRecord]()

    def record(self, record: RoundRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def state(rounds: int) -> State:
    return State(SCHEMA, {"A": np.full(1, rounds, np.float32)}, 0, rounds, {})


def told(recording: Recording, rounds: int) -> None:
    """Everything of a run, as the coordinator's hooks say it: a commit comes with the opening of the next round."""
    recording.put([RoundOpened(0, 0, "s0", ("a", "b"), 60.0)])
    for number in range(1, rounds + 1):
        events: list[Event] = [AdapterCommitted(number - 1, f"s{number}")]
        if number < rounds:
            events.append(RoundOpened(number, 0, f"s{number}", ("a", "b"), 60.0))
        recording.put(events)
        recording.committed(number, partial(dict, state(number).adapter))


def played(federation: Any, rounds: int) -> None:
    """Rounds of a coordinator whose records nobody writes."""
    federation.begin("ann", "ben")
    for _ in range(rounds):
        for client in ("ann", "ben"):
            federation.send(*federation.update(client))


def scores(records: list[RoundRecord]) -> list[tuple[int, float | None, float | None]]:
    return [(each.round, each.accuracy, each.loss) for each in records]


def test_every_so_many_rounds_and_the_last_are_scored_in_order(configure: Callable[..., RunConfig]) -> None:
    config = configure(7, evaluation={"every": 3}, privacy={"enabled": False})
    kept, asked = Kept(), list[float]()
    may_score, written_first = threading.Event(), list[int]()

    def score(adapter: Tensors) -> tuple[float, float]:
        assert may_score.wait(60)
        written_first.append(len(kept.records))
        asked.append(float(adapter["A"][0]))
        return asked[-1] / 10, asked[-1]

    with Recording(config, [kept], dict, score=score) as recording:
        told(recording, 7)  # nobody waits: not one score is there yet
        may_score.set()

    assert asked == [3, 6, 7]
    assert written_first == [2, 5, 6]
    assert scores(kept.records) == [
        (1, None, None),
        (2, None, None),
        (3, 0.3, 3.0),
        (4, None, None),
        (5, None, None),
        (6, 0.6, 6.0),
        (7, 0.7, 7.0),
    ]


def test_a_scorer_that_fails_is_left_out_and_said_once(
    configure: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(4, privacy={"enabled": False})
    kept, calls = Kept(), list[int]()

    def score(adapter: Tensors) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room for the batch")
        return 0.5, 0.7

    with Recording(config, [kept], dict, score=score) as recording:
        told(recording, 4)

    assert len(calls) == 2
    assert scores(kept.records) == [(1, 0.5, 0.7), (2, None, None), (3, None, None), (4, None, None)]
    (said,) = caplog.messages
    assert said == "held-out rows are not scored from round 2 on: no room for the batch"


def test_rounds_that_are_faster_than_scores_keep_few_adapters_in_memory(
    configure: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(20, privacy={"enabled": False})
    kept, may_score = Kept(), threading.Event()

    def score(adapter: Tensors) -> tuple[float, float]:
        assert may_score.wait(60)
        return 0.5, float(adapter["A"][0])

    with Recording(config, [kept], dict, score=score) as recording:
        told(recording, 20)
        may_score.set()

    assert [each.round for each in kept.records] == list(range(1, 21))
    scored = [each.round for each in kept.records if each.loss is not None]
    assert scored == [1, 2, 3, 4, 5, 6, 7, 8, 20], "the last round always has a score"
    (said,) = caplog.messages
    assert said == "rounds are faster than scores: round 9 has none; raise evaluation.every"


def test_a_coordinator_killed_before_the_score_was_written_has_it_scored_when_it_comes_back(
    tmp_path: Path, store: Store, federate: Callable[..., Any], configure: Callable[..., RunConfig]
) -> None:
    config = configure(3, evaluation={"every": 2}, privacy={"enabled": False})
    first = federate(store, config)
    played(first, 2)
    JsonLines(tmp_path).record(RoundRecord(1, 2, None, None, None, None, 10, 20, 5.0))

    for _ in range(2):  # the second time its record is there
        with observing(first.coordinator, store, tmp_path, score=lambda adapter: (0.75, 0.5)) as observation:
            pass
        records = read_metrics(tmp_path)
        assert scores(records) == [(1, None, None), (2, 0.75, 0.5)]
        assert records[1].clients == 2
        assert records[1].seconds >= 5.0
    assert b"fedloom_held_out_accuracy" not in observation.metrics.text(), "nothing was scored the second time"


def test_records_that_were_lost_come_back_only_where_their_times_are_known(
    tmp_path: Path,
    store: Store,
    federate: Callable[..., Any],
    configure: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = federate(store, configure(3, privacy={"enabled": False}))
    played(first, 2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "times", dict)  # as an earlier build left it
        with observing(first.coordinator, store, tmp_path):
            pass
        assert not (tmp_path / "metrics.jsonl").exists()

    with observing(first.coordinator, store, tmp_path):
        pass

    assert [each.round for each in read_metrics(tmp_path)] == [1, 2]
