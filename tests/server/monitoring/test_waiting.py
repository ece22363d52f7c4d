"""A run that waits says for whom, and one that waits in vain ends with what is committed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import ProtocolError
from fedloom.proto.messages import REFUSED, Finished, Wait
from fedloom.server.storage.local import Store


def after_one_round(federate: Any, configure: Any, store: Store, **rounds: Any) -> tuple[Any, list[str]]:
    """A run of ten rounds with one committed, and what it says."""
    federation = federate(store, configure(10, rounds=rounds))
    lines: list[str] = []
    federation.coordinator.say = lines.append
    federation.begin("ann", "ben")
    for client in ("ann", "ben"):
        federation.send(*federation.update(client, 1.0))
    return federation, lines


def wait(federation: Any, seconds: int, *present: str) -> None:
    for _ in range(seconds):
        federation.now_s += 1.0
        for client in present:
            federation.coordinator.heartbeat(client, *federation.runs[client])
        federation.coordinator.tick()


def test_a_run_whose_clients_have_left_ends_with_what_is_committed(federate: Any, configure: Any, store: Store) -> None:
    federation, lines = after_one_round(federate, configure, store, give_up_s=50.0)

    federation.coordinator.leave("ben", "budget spent", *federation.runs["ben"])
    wait(federation, 20, "ann")
    now = federation.coordinator.progress
    assert now.waiting == "round 2 can reach only 1 of the 2 updates it needs, and waits for more clients"
    assert not federation.coordinator.finished
    assert lines[-1] == now.waiting

    wait(federation, 40, "ann")

    ended = federation.work("ann")
    assert isinstance(ended, Finished)
    assert (ended.rounds, federation.coordinator.progress.over) == (1, True)
    assert lines[-1] == "the run ends with what is committed: 1 of 10 rounds"
    payload = federation.coordinator.blob("ann", ended.digest, *federation.runs["ann"])
    assert len(payload) == ended.bytes


def test_a_client_that_comes_in_time_lets_the_run_go_on(federate: Any, configure: Any, store: Store) -> None:
    federation, _ = after_one_round(federate, configure, store, give_up_s=50.0)
    federation.coordinator.leave("ben", "restarts", *federation.runs["ben"])
    wait(federation, 40, "ann")

    federation.begin("cat")
    wait(federation, 40, "ann", "cat")

    now = federation.coordinator.progress
    assert (now.waiting, now.over, now.waiting_s) == ("", False, 0.0)


def test_a_run_that_was_ended_stays_so(federate: Any, configure: Any, store: Store) -> None:
    federation, _ = after_one_round(federate, configure, store)
    federation.update("ann")

    federation.coordinator.finish()
    federation.coordinator.finish()

    assert isinstance(federation.work("ben"), Finished)
    again = federate(store, configure(10))
    again.begin("ann")
    assert isinstance(again.work("ann"), Finished)
    assert again.coordinator.progress.round == 1


def test_an_update_under_way_when_the_run_ends_is_not_taken(federate: Any, configure: Any, store: Store) -> None:
    federation, _ = after_one_round(federate, configure, store)
    update = federation.update("ann")
    federation.coordinator.finish()

    with pytest.raises(ProtocolError, match="drop it and ask for work"):
        federation.send(*update)


def test_nothing_is_ended_before_a_round_is_committed(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(10, rounds={"give_up_s": 20.0}))

    with pytest.raises(ProtocolError, match="no round is committed yet"):
        federation.coordinator.finish()
    wait(federation, 60)

    assert not federation.coordinator.finished


def test_who_is_asked_and_who_refuses_is_said(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(3))
    lines: list[str] = []
    federation.coordinator.say = lines.append
    federation.join("cat")
    federation.coordinator.leave("cat", REFUSED, *federation.runs["cat"])
    wait(federation, 12)

    assert lines == [
        "cat refuses to take part; its own log says why",
        "round 1 waits for clients: 0 of 2 are here; cat refused to take part, their own logs say why",
    ]
    federation.begin("ann", "ben")
    assert lines[2:] == ["round 1 asks ann, ben"]
    assert federation.coordinator.progress.refusing == ("cat",)
    assert ("declined", "cat") in {(record.kind, record.client) for record in store.audit()}
    federation.begin("cat")
    assert federation.coordinator.progress.refusing == ()


def test_a_state_put_back_from_a_backup_is_said_to_be_an_end_and_can_be_ended(
    federate: Any, configure: Any, tmp_path: Path
) -> None:
    """Its clients have answered round 2, which the backup has forgotten, and their ledgers answer it no second time."""
    run = configure(10)
    with Store(tmp_path / "state", durable=False) as store:
        federation, _ = after_one_round(federate, configure, store)
        shutil.copytree(tmp_path / "state", tmp_path / "backup")
        for client in ("ann", "ben"):
            federation.send(*federation.update(client, 1.0))
        assert federation.coordinator.progress.round == 2
    with Store(tmp_path / "backup", durable=False) as store:
        again = federate(store, run)
        lines: list[str] = []
        again.coordinator.say = lines.append
        again.begin("ann", "ben")
        for client in ("ann", "ben"):
            again.coordinator.leave(client, REFUSED, *again.runs[client])
        wait(again, 12)

        assert "this state was put back from a backup, and the run cannot go on" in lines[-2]
        assert "with its 1 rounds by `fedloom operate finish`, or begin a new run in another directory" in lines[-2]
        assert lines[-1].startswith("round 2 can reach only 0 of the 2 updates it needs")
        assert lines[-1].endswith("ann, ben refused to take part, their own logs say why")
        again.coordinator.finish()
        again.begin("ann")
        assert isinstance(again.work("ann"), Finished)


def test_the_first_round_waits_for_the_sites_that_are_expected(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(3, rounds={"expected": ["ann", "cat"]}))
    federation.begin("ann", "ben")
    wait(federation, 12, "ann", "ben")

    assert federation.work("ann") == Wait(0.0)
    assert federation.coordinator.progress.waiting == "round 1 waits for cat of rounds.expected"
    federation.begin("cat")

    assert federation.coordinator.progress.cohort == ("ann", "ben", "cat")
