"""What a client that trains hears with every heartbeat: the oldest round whose updates are still taken."""

from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import ProtocolError
from fedloom.proto.messages import RoundStatus, UpdateHeader
from fedloom.server.rounds.state import RoundOpened
from fedloom.server.storage.local import Store


def told(federation: Any, client: str) -> RoundStatus:
    standing = federation.coordinator.heartbeat(client, *federation.runs[client])
    assert isinstance(standing, RoundStatus)
    return standing


def taken(federation: Any, header: UpdateHeader) -> bool:
    """Whether an update that was made in time would be taken if it came now; it is not sent."""
    try:
        federation.coordinator.check_header(header, *federation.runs[header.client])
    except ProtocolError:
        return False
    return True


def test_a_round_that_closes_at_its_deadline_is_over_for_who_is_late(federate: Any, store: Store) -> None:
    federation = federate(store, expect=3)
    federation.begin("ann", "ben", "cat")
    late, _ = federation.update("cat")
    assert (told(federation, "cat"), taken(federation, late)) == (RoundStatus(0, True, 0), True)
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    assert told(federation, "cat") == RoundStatus(0, True, 0), "nobody's time is over yet"
    for federation.now_s in (9.0, 18.0, 27.0, 36.0, 45.0, 54.0, 63.0, 72.0, 81.0, 90.0, 99.0):
        for client in ("ann", "ben", "cat"):
            told(federation, client)
    federation.now_s = 101.0
    federation.coordinator.tick()

    assert told(federation, "cat") == RoundStatus(1, True, 1)
    assert not taken(federation, late)


def test_a_round_that_opens_again_for_want_of_updates_is_not_over(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    made, _ = federation.update("ann")
    federation.coordinator.leave("ben", "", *federation.runs["ben"])
    federation.begin("cat")

    assert federation.coordinator.progress.round == 0
    opened = [event.attempt for event in store.events() if isinstance(event, RoundOpened)]
    assert opened == [0, 1], "it is open for the second time"
    assert told(federation, "ann") == RoundStatus(0, True, 0)
    assert taken(federation, made)


def test_between_two_rounds_the_last_one_is_over(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    updates = [federation.update(name) for name in ("ann", "ben")]
    federation.send(*updates[0])
    federation.coordinator.leave("ann", "", *federation.runs["ann"])
    federation.send(*updates[1])

    assert told(federation, "ben") == RoundStatus(1, False, 1), "one client is too few for the next"


def test_after_the_last_round_every_round_is_over(federate: Any, configure: Any, store: Store) -> None:
    rules = {"mode": "buffered", "clients_per_round": 2, "min_clients": 2, "lease_s": 1e6}
    federation = federate(store, configure(1, rounds=rules))
    federation.begin("ann", "ben", "cat")
    for name in ("ann", "ben"):
        federation.send(*federation.update(name))

    assert told(federation, "cat") == RoundStatus(1, False, 1)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_buffered_round_is_over_exactly_when_its_update_is_refused(
    federate: Any, configure: Any, store: Store, max_staleness: int
) -> None:
    rules = {"mode": "buffered", "clients_per_round": 2, "min_clients": 2, "lease_s": 1e6}
    federation = federate(store, configure(6, rounds={**rules, "max_staleness": max_staleness}))
    federation.begin("ann", "ben", "cat")
    late, _ = federation.update("cat")
    found = []
    for _ in range(5):
        found.append(told(federation, "cat").oldest <= late.round)
        assert found[-1] == taken(federation, late)
        for name in ("ann", "ben"):
            federation.send(*federation.update(name))

    assert found == [number <= max_staleness for number in range(5)]


@pytest.mark.parametrize(
    ("before", "after", "open_round", "next_round"),
    [("synchronous", "buffered", 1, 0), ("buffered", "synchronous", 0, 2)],
)
def test_a_restart_with_another_rule_changes_the_next_round_and_not_the_open_one(
    federate: Any, configure: Any, tmp_path: Path, before: str, after: str, open_round: int, next_round: int
) -> None:
    rules = {"clients_per_round": 2, "min_clients": 2, "lease_s": 1e6}
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, configure(4, rounds={**rules, "mode": before}))
        federation.begin("ann", "ben")
        for name in ("ann", "ben"):
            federation.send(*federation.update(name))
        updates = [federation.update(name) for name in ("ann", "ben")]

    with Store(tmp_path, durable=False) as store:
        again = federate(store, configure(4, rounds={**rules, "mode": after}))
        again.join("ann", "ben")
        assert told(again, "ann") == RoundStatus(1, True, open_round)
        for update in updates:
            again.send(*update)
        again.begin("ann", "ben")
        assert told(again, "ann") == RoundStatus(2, True, next_round)


def test_a_heartbeat_to_an_earlier_epoch_says_nothing(federate: Any, tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        before = federate(store)
        before.begin("ann", "ben")
    with Store(tmp_path, durable=False) as store:
        after = federate(store)
        after.begin("ann", "ben")
        with pytest.raises(ProtocolError, match="epoch 1"):
            after.coordinator.heartbeat("ann", *before.runs["ann"])
