"""Time in which the coordinator hears nobody: a commit that takes long, a process that is stopped."""

from dataclasses import dataclass, field
from typing import Any

from fedloom.server.rounds.clock import Attentive
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State
from fedloom.strategies.fedavg import FedAvg

CLIENTS = tuple(f"c{number:02}" for number in range(20))


@dataclass
class Wall:
    """A clock that is set by hand."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Slow(FedAvg):
    """FedAvg whose commit takes 40 seconds."""

    wall: Wall = field(default_factory=Wall)

    def commit(self, state: State, acc: Any) -> State:
        self.wall.now_s += 40.0
        return super().commit(state, acc)


def run(federate: Any, configure: Any, store: Store, wall: Wall, strategy: FedAvg) -> Any:
    rounds = {"min_clients": 2, "lease_s": 30.0, "deadline_s": 60.0}
    federation = federate(store, configure(3, rounds=rounds), strategy, expect=20, clock=Attentive(10.0, wall))
    federation.begin(*CLIENTS)
    return federation


def test_who_was_there_before_a_long_commit_is_asked_after_it(federate: Any, configure: Any, store: Store) -> None:
    wall = Wall()
    federation = run(federate, configure, store, wall, Slow(wall=wall))

    for client in CLIENTS:
        federation.send(*federation.update(client))

    now = federation.coordinator.progress
    assert now.round == 1
    assert now.cohort == CLIENTS
    assert now.elapsed_s == 0.0  # the new round has its whole deadline


def test_a_process_that_was_stopped_loses_nobody_and_keeps_the_deadline(
    federate: Any, configure: Any, store: Store
) -> None:
    wall = Wall()
    federation = run(federate, configure, store, wall, FedAvg())

    wall.now_s += 500.0
    federation.coordinator.tick()

    now = federation.coordinator.progress
    assert (now.live, now.lost, now.elapsed_s) == (CLIENTS, {}, 10.0)


def test_a_client_that_stays_silent_is_lost_though_the_clock_stood_still(
    federate: Any, configure: Any, store: Store
) -> None:
    wall = Wall()
    federation = run(federate, configure, store, wall, FedAvg())

    for _ in range(31):
        wall.now_s += 1.0
        federation.coordinator.heartbeat("c00", *federation.runs["c00"])
        federation.coordinator.tick()

    assert federation.coordinator.progress.live == ("c00",)
