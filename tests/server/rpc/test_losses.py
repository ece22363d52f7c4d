import hashlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.errors import ProtocolError, UpdateRejected
from fedloom.proto.messages import Assignment, Finished, Wait
from fedloom.server.rounds.state import ClientLost, RoundClosed, RoundOpened
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Plan, State
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.state import state_to_bytes


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_poisoned_update_is_refused_and_the_round_goes_on_without_it(
    federate: Any, configure: Any, tmp_path: Path, poison: float
) -> None:
    results = []
    for name, clients in (("with", ("ann", "bad", "cat")), ("without", ("ann", "cat"))):
        with Store(tmp_path / name, durable=False) as store:
            federation = federate(store, configure(1), expect=len(clients))
            federation.begin(*clients)
            for client in clients:
                if client == "bad":
                    update = federation.update(client, poison)
                    for _ in range(2):
                        with pytest.raises(UpdateRejected):
                            federation.send(*update)
                    assert federation.work(client) == Wait(0.0)
                else:
                    federation.send(*federation.update(client))
            assert federation.coordinator.finished
            results.append(federation.adapter())

    assert results[0] == results[1]


def test_a_dead_client_is_not_waited_for_longer_than_its_lease(federate: Any, store: Store) -> None:
    federation = federate(store, expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    federation.now_s = 9.0
    federation.coordinator.heartbeat("ann", *federation.runs["ann"])
    federation.coordinator.heartbeat("ben", *federation.runs["ben"])

    federation.coordinator.tick()
    assert federation.coordinator.progress.round == 0
    federation.now_s = 10.5
    federation.coordinator.tick()

    assert federation.coordinator.progress.round == 1
    assert federation.coordinator.progress.cohort == ("ann", "ben")
    assert [event for event in store.events() if isinstance(event, ClientLost)] == [ClientLost(0, "cat", "lease")]


def test_a_late_update_is_refused_and_its_client_takes_part_again(federate: Any, store: Store) -> None:
    federation = federate(store, expect=3)
    federation.begin("ann", "ben", "cat")
    late = federation.update("cat")
    federation.now_s = 11.0
    for client in ("ann", "ben"):
        federation.coordinator.heartbeat(client, *federation.runs[client])
        federation.send(*federation.update(client))

    assert federation.coordinator.progress.round == 1
    with pytest.raises(ProtocolError, match="is for round 1, which was closed without it; drop it"):
        federation.send(*late)
    for client in ("ann", "ben"):
        federation.send(*federation.update(client))
    assert federation.coordinator.finished


def test_a_client_that_leaves_is_not_waited_for_and_may_come_back(federate: Any, store: Store) -> None:
    federation = federate(store, expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))

    federation.coordinator.leave("cat", "budget spent", *federation.runs["cat"])
    assert federation.coordinator.progress.round == 1
    assert "cat" not in federation.coordinator.progress.live
    federation.work("cat")

    assert "cat" in federation.coordinator.progress.live


def test_the_deadline_closes_a_round_with_the_updates_it_has(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(rounds={"deadline_s": 5.0}), expect=3)
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("cat"))
    federation.now_s = 4.9
    federation.coordinator.tick()
    assert federation.coordinator.progress.round == 0

    federation.now_s = 5.0
    federation.coordinator.tick()

    assert federation.coordinator.progress.round == 1
    assert RoundClosed(0, ("ann", "cat"), "deadline") in store.events()


def test_a_short_round_says_so_and_goes_on_with_another_client(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.coordinator.leave("ben", "", *federation.runs["ben"])
    assert federation.coordinator.progress.short

    federation.begin("cat")
    federation.send(*federation.update("cat"))

    assert federation.coordinator.progress.round == 1
    openings = [event for event in store.events() if isinstance(event, RoundOpened)]
    assert [(event.round, event.attempt, event.cohort) for event in openings] == [
        (0, 0, ("ann", "ben")),
        (0, 1, ("ann", "cat")),
        (1, 0, ("ann", "cat")),
    ]


def test_updates_are_dropped_from_the_disk_after_the_commit(federate: Any, store: Store) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    assert len(list((store.folder / "blobs").iterdir())) == 2

    federation.send(*federation.update("ben"))

    federation.coordinator.tick()
    (left,) = (store.folder / "blobs").iterdir()
    assert left.name == hashlib.sha256(state_to_bytes(federation.coordinator.state)).hexdigest()


def test_clients_with_the_same_plan_share_one_broadcast_and_others_do_not(federate: Any, store: Store) -> None:
    class ByRank(FedAvg):
        def plan(self, state: State, round: int, client: str) -> Plan:
            plan = super().plan(state, round, client)
            if client != "low":
                return plan
            small = {"m.A": state.adapter["m.A"][:1], "m.B": state.adapter["m.B"][:, :1]}
            return replace(plan, rank=1, broadcast={**plan.broadcast, **small})

    federation = federate(store, strategy=ByRank(), expect=3)
    federation.begin("ann", "ben", "low")

    ann, ben, low = (federation.assignment(client) for client in ("ann", "ben", "low"))
    assert ann is ben
    assert low.rank == 1
    assert low.broadcast_bytes == ann.broadcast_bytes - 4 * (5 + 4)
    with pytest.raises(ProtocolError, match="may not fetch"):
        federation.coordinator.blob("ann", low.broadcast_digest, *federation.runs["ann"])


def test_the_run_is_over_once_every_live_client_has_its_end(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(1))
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    final = federation.work("ann")
    assert isinstance(final, Finished)
    assert not federation.coordinator.over

    federation.coordinator.blob("ann", final.digest, *federation.runs["ann"])
    assert not federation.coordinator.over
    federation.coordinator.leave("ben", "done", *federation.runs["ben"])

    assert federation.coordinator.over


def test_many_threads_make_one_run(federate: Any, configure: Any, store: Store) -> None:
    names = [f"c{number}" for number in range(6)]
    federation = federate(store, configure(5), expect=len(names))
    federation.join(*names)
    errors: list[BaseException] = []

    def client(name: str) -> None:
        try:
            while not isinstance(answer := federation.work(name), Finished):
                if isinstance(answer, Assignment):
                    federation.send(*federation.update(name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert federation.coordinator.finished
    closings = [event for event in store.events() if isinstance(event, RoundClosed)]
    assert [event.clients for event in closings] == [tuple(names)] * 5
