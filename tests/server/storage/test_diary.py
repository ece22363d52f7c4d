"""What a state directory knows of times and traffic after its coordinator was killed."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.config.run import RunConfig
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.server.monitoring.status import observing
from fedloom.server.rounds.state import ClientLost
from fedloom.server.storage.local import Store


def killed(store: Store) -> None:
    """What a process leaves that is killed: nothing more is written."""
    store.close()


def played(federation: Any, *clients: str) -> int:
    """One round; the bytes of an update."""
    size = 0
    for client in clients:
        header, payload = federation.update(client)
        federation.send(header, payload)
        size = len(payload)
    return size


@pytest.fixture
def at_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The wall clock, in its only element."""
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_traffic_outlasts_the_process_that_counted_it(tmp_path: Path, federate: Any) -> None:
    first = Store(tmp_path, durable=False)
    federation = federate(first)
    federation.begin("ann", "ben")
    size = played(federation, "ann", "ben")
    counted = federation.coordinator.progress
    killed(first)

    with Store(tmp_path, durable=False) as second:
        again = federate(second)
        before = again.coordinator.progress
        again.begin("ann", "ben")
        played(again, "ann")
        now = again.coordinator.progress

    assert counted.bytes_by_round[0][1] == 2 * size
    assert (before.bytes_by_round, before.bytes_by_client) == (counted.bytes_by_round, counted.bytes_by_client)
    assert now.bytes_by_client["ann"][1] == 2 * size
    assert now.bytes_by_round[1][1] == size


def test_a_broadcast_that_no_event_follows_is_counted_by_the_next_tick(tmp_path: Path, federate: Any) -> None:
    first = Store(tmp_path, durable=False)
    federation = federate(first)
    federation.begin("ann", "ben")
    federation.update("ann")  # fetches, and sends nothing
    federation.coordinator.tick()
    counted = federation.coordinator.progress.bytes_by_client
    killed(first)

    with Store(tmp_path, durable=False) as second:
        assert second.traffic.clients == counted
    assert counted["ann"][0] > 0


def test_each_event_has_the_time_at_which_it_was_written(tmp_path: Path, at_s: list[float]) -> None:
    with Store(tmp_path, durable=False) as store:
        store.append(ClientLost(0, "ann", "left"), ClientLost(0, "ben", "left"))
        at_s[0] += 5.0
        store.append(ClientLost(0, "cat", "left"))
        links = store._marks["events"]
    with Store(tmp_path / "later", durable=False) as other:
        other.append(ClientLost(0, "ann", "left"), ClientLost(0, "ben", "left"), ClientLost(0, "cat", "left"))

        assert other._marks["events"] == links, "no digest depends on the clock"
    with Store(tmp_path, durable=False) as store:
        assert store.times() == {1: 1_000_000.0, 2: 1_000_000.0, 3: 1_000_005.0}


def test_a_directory_without_a_diary_gets_one_and_invents_nothing(tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        store.append(ClientLost(0, "ann", "left"))
    with closing(sqlite3.connect(tmp_path / "run.db")) as db, db:
        for name in ("times", "round_bytes", "client_bytes"):
            db.execute(f"DROP TABLE {name}")

    with Store(tmp_path, durable=False) as store:
        store.append(ClientLost(0, "ben", "left"))

        assert list(store.times()) == [2]
        assert store.traffic.rounds == {}


def test_records_that_a_killed_coordinator_owed_are_written_with_their_own_times(
    tmp_path: Path, federate: Any, configure: Callable[..., RunConfig], at_s: list[float]
) -> None:
    """Two rounds were held back by a score when it was killed: their lines came with wrong seconds, or not at all."""
    run = configure(4, evaluation={"every": 2}, privacy={"enabled": False})
    first = Store(tmp_path / "state", durable=False)
    federation = federate(first, run)
    federation.begin("ann", "ben")
    for _ in range(2):
        at_s[0] += 10.0
        size = played(federation, "ann", "ben")
    killed(first)
    at_s[0] += 500.0  # nobody works on it

    with Store(tmp_path / "state", durable=False) as second:
        again = federate(second, run)
        with observing(again.coordinator, second, tmp_path, score=lambda adapter: (0.75, 0.5)):
            again.begin("ann", "ben")
            at_s[0] += 10.0
            played(again, "ann", "ben")

    records = read_metrics(tmp_path)
    assert [(each.round, each.accuracy) for each in records] == [(1, None), (2, 0.75), (3, None)]
    assert [each.seconds for each in records[:2]] == [10.0, 20.0]
    assert records[2].seconds >= 520.0, "the run's age goes on"
    assert [each.bytes_up for each in records] == [2 * size] * 3
