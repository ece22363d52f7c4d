"""A commit that takes long: everybody is answered meanwhile, and nothing is lost or done twice."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import Overloaded, ProtocolError, StrategyError
from fedloom.proto.messages import Assignment, Finished, RoundStatus, Wait
from fedloom.server.rounds.clock import Attentive
from fedloom.server.rounds.state import AdapterCommitted, RoundClosed, RoundOpened, UpdateAccepted
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State
from fedloom.strategies.fedavg import FedAvg

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Held(FedAvg):
    """FedAvg whose commit lasts until it is let go."""

    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    commits: list[int] = field(default_factory=list)

    def commit(self, state: State, acc: Any) -> State:
        self.commits.append(state.round)
        self.begun.set()
        assert self.go.wait(DEADLINE_S)
        return super().commit(state, acc)


@contextmanager
def committing(federation: Any, strategy: Held, *clients: str) -> Iterator[None]:
    """The round's updates are in, and it is being committed in another thread until the block ends."""
    updates = [federation.update(client) for client in clients]
    for update in updates[:-1]:
        federation.send(*update)
    last = threading.Thread(target=federation.send, args=updates[-1])
    last.start()
    assert strategy.begun.wait(DEADLINE_S)
    try:
        yield
    finally:
        strategy.go.set()
        last.join(DEADLINE_S)


def test_while_a_round_is_committed_everybody_is_answered(federate: Any, configure: Any, store: Store) -> None:
    strategy = Held()
    federation = federate(store, configure(2), strategy)
    federation.begin("ann", "ben")
    sent = federation.update("ann")
    with committing(federation, strategy, "ann", "ben"):
        assert federation.coordinator.heartbeat("ann", *federation.runs["ann"]) == RoundStatus(1, False, 1)
        federation.join("eve")
        assert federation.work("eve") == Wait(0.0)
        assert federation.work("ann") == Wait(0.0)
        assert federation.send(*sent) is True
        federation.coordinator.tick()
        assert not federation.coordinator.progress.open
        assert federation.coordinator.state.round == 0

    assert federation.coordinator.state.round == 1
    assert federation.coordinator.progress.cohort == ("ann", "ben", "eve")
    assert strategy.commits == [0]


def test_an_update_that_comes_too_late_for_a_round_being_committed_is_told_so(
    federate: Any, configure: Any, store: Store
) -> None:
    strategy = Held()
    federation = federate(store, configure(2, rounds={"clients_per_round": 2, "dropout_rate": 0.3}), strategy, expect=3)
    federation.begin("ann", "ben", "cat")
    late = federation.update("cat")
    with (
        committing(federation, strategy, "ann", "ben"),
        pytest.raises(ProtocolError, match="for round 1, which was closed without it"),
    ):
        federation.send(*late)

    taken = [event.client for event in store.events() if isinstance(event, UpdateAccepted)]
    assert taken == ["ann", "ben"]


def test_a_buffered_update_that_comes_during_a_commit_counts_after_it(
    federate: Any, configure: Any, store: Store
) -> None:
    strategy = Held()
    rules = {"mode": "buffered", "clients_per_round": 2, "min_clients": 2, "lease_s": 1e6}
    federation = federate(store, configure(3, rounds=rules), strategy)
    federation.begin("ann", "ben", "cat")
    late = federation.update("cat")
    with committing(federation, strategy, "ann", "ben"), pytest.raises(Overloaded, match="being committed"):
        federation.send(*late)

    assert federation.send(*late) is False
    assert federation.coordinator.progress.submitted == ("cat",)


def test_an_operator_who_ends_the_run_waits_for_the_commit(federate: Any, configure: Any, store: Store) -> None:
    strategy = Held()
    federation = federate(store, configure(9), strategy)
    federation.begin("ann", "ben")
    ending = threading.Thread(target=federation.coordinator.finish)
    with committing(federation, strategy, "ann", "ben"):
        ending.start()
        ending.join(0.2)
        assert ending.is_alive()
    ending.join(DEADLINE_S)

    assert isinstance(federation.work("ann"), Finished)
    assert federation.coordinator.progress.round == 1


def test_a_run_may_be_ended_by_whoever_is_told_of_a_commit(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(9))
    federation.coordinator.on_commit = lambda rounds, state: federation.coordinator.finish()
    federation.begin("ann", "ben")
    for client in ("ann", "ben"):
        federation.send(*federation.update(client))

    assert federation.coordinator.finished


def test_a_commit_under_way_is_not_begun_twice_and_its_order_in_the_log_stays(
    federate: Any, configure: Any, store: Store
) -> None:
    strategy = Held()
    federation = federate(store, configure(2), strategy)
    federation.begin("ann", "ben")
    with committing(federation, strategy, "ann", "ben"):
        for _ in range(3):
            federation.coordinator.tick()
            federation.work("ann")

    kinds = [type(event) for event in store.events()]
    assert kinds[-3:] == [RoundClosed, AdapterCommitted, RoundOpened]
    assert strategy.commits == [0]


def test_a_server_commits_in_a_thread_of_its_own(federate: Any, configure: Any, store: Store) -> None:
    strategy = Held()
    federation = federate(store, configure(2), strategy)
    with serving(federation.coordinator):
        federation.begin("ann", "ben")
        for client in ("ann", "ben"):
            federation.send(*federation.update(client))  # it returns though the commit goes on
        assert strategy.begun.wait(DEADLINE_S)
        assert federation.coordinator.state.round == 0
        strategy.go.set()

    assert federation.coordinator.state.round == 1


def test_a_server_whose_commit_fails_ends_with_its_error(federate: Any, store: Store) -> None:
    class Failing(FedAvg):
        def commit(self, state: State, acc: Any) -> State:
            raise ValueError("no such thing")

    federation = federate(store, strategy=Failing())

    def serve() -> None:
        with serving(federation.coordinator):
            federation.begin("ann", "ben")
            for client in ("ann", "ben"):
                federation.send(*federation.update(client))
            threading.Event().wait(1.0)

    with pytest.raises(StrategyError, match="fails in commit of round 1: ValueError: no such thing"):
        serve()


def test_time_for_which_the_lock_is_held_counts_against_nobody(federate: Any, configure: Any, store: Store) -> None:
    now_s = [0.0]

    class SlowPlans(FedAvg):
        def plan(self, state: State, round: int, client: str) -> Any:
            now_s[0] += 9.0  # short enough for one step of the clock, too long for a lease if it is counted each time
            return super().plan(state, round, client)

    names = [f"c{number}" for number in range(8)]
    clock = Attentive(10.0, lambda: now_s[0])
    rules = {"rounds": {"min_clients": 8, "lease_s": 30.0, "deadline_s": 60.0}}
    federation = federate(store, configure(1, **rules), SlowPlans(), expect=8, clock=clock)
    federation.begin(*names)
    for name in names:
        assert isinstance(federation.work(name), Assignment)
        now_s[0] += 1.0

    assert now_s[0] > 70.0
    progress = federation.coordinator.progress
    assert (progress.live, progress.lost) == (tuple(names), {})
    assert progress.elapsed_s < 10.0


@pytest.mark.parametrize("bound", [0, 1 << 20])
def test_updates_are_read_back_without_the_lock(
    federate: Any, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr("fedloom.server.rounds.aggregation._FRESH_BYTES", bound)
    answered: list[RoundStatus] = []

    class Reading(Store):
        """A store that lets a client call while a blob is read."""

        meanwhile: Callable[[], None] = staticmethod(lambda: None)

        def get_blob(self, digest: str) -> bytes:
            caller = threading.Thread(target=self.meanwhile)
            caller.start()
            caller.join(DEADLINE_S)
            return super().get_blob(digest)

    with Reading(tmp_path / "state", durable=False) as store:
        federation = federate(store, configure(1))
        federation.begin("ann", "ben")
        ann = federation.runs["ann"]
        store.meanwhile = lambda: answered.append(federation.coordinator.heartbeat("ann", *ann))
        for client in ("ann", "ben"):
            federation.send(*federation.update(client))

    assert answered == [RoundStatus(1, False, 1)] * (0 if bound else 2)
