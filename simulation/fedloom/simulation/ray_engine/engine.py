"""The Ray engine: the coordinator and the real participants in this process, their steps on the actors of a cluster."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from weakref import WeakValueDictionary

from fedloom.client.data.rows import digest
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.held import HeldAdapter, Shared
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import EntropyFor
from fedloom.proto.messages import Answer, Joined, StepMessage, StepResult, Wait
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.local import LocalConnection
from fedloom.simulation.federation import Federation, check_alive
from fedloom.simulation.ray_engine.cluster import connected
from fedloom.simulation.ray_engine.fleet import Fleet
from fedloom.simulation.ray_engine.training import ObjectStore, RemoteTraining
from fedloom.simulation.ray_engine.turns import Turns

__all__ = ["run_ray"]

_LOOK_S = 0.1


def run_ray(
    federation: Federation, coordinator: Coordinator, *, entropy: Mapping[str, EntropyFor] | None = None
) -> Iterator[None]:
    """Run to the end, yielding a few times a second so that the caller can look and evaluate.

    Args:
        federation: Data and policies; each actor loads a base model of its own.
        coordinator: Just made, on `standing_clock`, expecting as many clients as there are.
        entropy: Test seam: each client's randomness by name, see `Trainer`.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
        FedloomError: A client cannot go on, too many updates were refused for the round to close, or actors cannot be
            had.
    """
    declared = {name: policy.data.declared_examples or 0 for name, policy in federation.policies.items()}
    turns, threads = Turns(declared), list[threading.Thread]()
    with connected(federation.config.engine.address) as ray, ExitStack() as ledgers:
        store = ObjectStore(ray)
        try:
            with Fleet(ray, federation.config, len(declared)) as fleet:
                clients = {
                    name: _Client(federation, coordinator, name, ledgers, fleet, store, (entropy or {}).get(name))
                    for name in declared
                }
                adapters: Shared = WeakValueDictionary()
                for client in clients.values():
                    client.participant.held = HeldAdapter(adapters)
                    client.participant.join()
                    yield
                coordinator.wake = turns.stir
                while turns.goes_on(_LOOK_S):
                    fleet.check()
                    check_alive(federation, coordinator)
                    # As many at work as there are actors: whoever has a turn need not wait for one.
                    for _ in range(fleet.size - len(threads)):
                        threads.append(threading.Thread(target=_work, args=(turns, clients), name="ray-turns"))
                        threads[-1].start()
                    yield
        finally:
            turns.close()
            for thread in threads:
                thread.join()
    coordinator.close()


class _Line(LocalConnection):
    """A line that remembers whether its last answer was to wait."""

    waits = False

    def work(self, held: str = "") -> Answer:
        """Ask for work."""
        answer = super().work(held)
        self.waits = isinstance(answer, Wait)
        return answer

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Send a step of a secure sum."""
        result = super().exchange(message)
        self.waits = result is None
        return result


class _Client:
    """One client: its participant, and what its turns tell."""

    def __init__(
        self,
        federation: Federation,
        coordinator: Coordinator,
        name: str,
        ledgers: ExitStack,
        fleet: Fleet,
        store: ObjectStore,
        entropy_for: EntropyFor | None,
    ) -> None:
        self._line = _Line(coordinator)
        self._training: RemoteTraining | None = None

        def ready(joined: Joined) -> RemoteTraining:
            rows, policy, ledger = federation.clients[name], federation.policies[name], None
            if joined.spec.privacy.enabled:
                ledger = ledgers.enter_context(Ledger(policy.client.state / "ledger", digest(rows)))
            training = RemoteTraining(federation, joined, name, ledger, fleet, store, entropy_for)
            if joined.spec.federated_evaluation.enabled:
                self.participant.ended = partial(training.score, joined.run)
            self._training = training
            return training

        self.participant = Participant(self._line, federation.policies[name], ready)

    def turn(self) -> tuple[bool, bool]:
        """Ask for work and do it; whether the run is over, and if not whether there is nothing to do now."""
        finished = self.participant.step()
        if finished is not None:
            self.participant.conclude(finished)
        return finished is not None, self._line.waits

    @property
    def seconds(self) -> float | None:
        """How long its last round took; None before the first."""
        return self._training.seconds if self._training is not None else None


def _work(turns: Turns, clients: Mapping[str, _Client]) -> None:
    """Give clients their turns, one after the other, until there is nothing to do any more."""
    while (name := turns.take()) is not None:
        client = clients[name]
        try:
            done, waits = client.turn()
        except BaseException as error:  # raised again where the run is
            turns.fail(error)
            return
        turns.give(name, done=done, waits=waits, seconds=client.seconds)
