"""A federation in virtual time: the coordinator, the trainers and the ledgers of the in-process engine, on events.

What is computed is computed at once. Its update is delivered when it would have been there, on a clock that jumps from
one event to the next; the coordinator has no other clock, so deadlines, leases and buffers go by it.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, FedloomError, PolicyError
from fedloom.server.coordinator import Coordinator
from fedloom.simulation.federation import Federation, check_alive
from fedloom.simulation.in_process.engine import client_trainer
from fedloom.simulation.virtual_time.assignments import ASSIGNMENTS_FILE, Assignments
from fedloom.simulation.virtual_time.client import Client
from fedloom.simulation.virtual_time.devices import devices
from fedloom.simulation.virtual_time.trace import Session

__all__ = ["Clock", "check_virtual", "clients_at_start", "run_in_virtual_time"]

log = logging.getLogger(__name__)

_MOMENT_S = 1e-6
"""Added to a deadline, so that rounding cannot make it look as if it had not passed."""

_CLIENTS, _DEPARTURES, _LOOKS = range(3)
"""What comes first at one time: an update that arrives as its client goes, or its round ends, has arrived."""


class Clock:
    """Virtual seconds since the run began. It stands still until it is set."""

    now_s = 0.0

    def __call__(self) -> float:
        """The time now."""
        return self.now_s


def check_virtual(config: RunConfig) -> None:
    """Refuse a run file that nothing can run in virtual time.

    Raises:
        ConfigError: Another engine is asked for, or secure sums.
    """
    if config.virtual_time is None:
        return
    if config.engine.kind != "inprocess":
        raise ConfigError(
            f'engine.kind = "{config.engine.kind}" works in real time and a run file with [virtual_time] does not; '
            'leave that section out, or set engine.kind = "inprocess"'
        )
    if config.secure_aggregation.enabled:
        raise ConfigError(
            "[virtual_time] knows how long an update takes, and nothing of the further messages of a secure sum; leave "
            "that section out, or set secure_aggregation.enabled = false"
        )


def clients_at_start(federation: Federation) -> int:
    """How many clients ask for work before the first round opens: in virtual time those who are there at 0, or all.

    Raises:
        ConfigError: The trace cannot be read, or lacks a client.
    """
    section = federation.config.virtual_time
    if section is None:
        return len(federation.clients)
    return sum(device.at_start for device in devices(section, federation.clients).values())


def run_in_virtual_time(federation: Federation, coordinator: Coordinator, clock: Clock, folder: Path) -> Iterator[None]:
    """Run to the end, yielding after every event so that the caller can look and evaluate.

    Args:
        federation: Model, data and policies; its run file has a [virtual_time].
        coordinator: Just made, on `clock`, expecting as many clients as there are at the start.
        clock: At 0.
        folder: The run folder, which gets an assignments.csv.

    Raises:
        FedloomError: A client cannot go on, or nobody is left who could end the run.
    """
    section = federation.config.virtual_time
    assert section is not None  # the caller's promise
    with ExitStack() as stack:
        assignments = stack.enter_context(Assignments(folder))
        found = devices(section, federation.clients)
        clients = [
            Client(
                device,
                federation.policies[name],
                coordinator,
                clock,
                partial(client_trainer, federation, name, stack),
                assignments,
            )
            for name, device in found.items()
        ]
        events = _Events(federation, coordinator, clock, clients)
        for index, device in enumerate(found.values()):
            events.expect(index, device.sessions())
        while events.step():
            yield
    coordinator.close()


class _Events:
    """What happens next.

    At one time clients act by turns, each once in a cycle, as in the in-process engine.
    """

    def __init__(self, federation: Federation, coordinator: Coordinator, clock: Clock, clients: list[Client]) -> None:
        self._federation, self._coordinator, self._clock, self._clients = federation, coordinator, clock, clients
        self._rounds = federation.config.rounds
        self._queue: list[tuple[float, int, int, int, int, Callable[[], None]]] = []
        self._serial, self._cycle, self._index = count(), 0, -1
        self._turns = [0] * len(clients)
        self._idle = set[int]()
        self._woken = self._looking = self._last_look = False
        self._beat_s, self._committed, self._committed_s = 0.0, 0, 0.0
        coordinator.wake = self._wake

    def step(self) -> bool:
        """Let the next event happen; False if there is none because the run is over.

        Raises:
            FedloomError: There is none, or no round has ended for long, and the run is not over.
        """
        coordinator = self._coordinator
        self._pass_word()
        if coordinator.finished and not any(each.there and not each.finished for each in self._clients):
            return False
        if not self._queue:
            self._look_once_more()
        time_s, rank, self._cycle, self._index, _, do = heappop(self._queue)
        waited_s = time_s - self._committed_s
        if rank != _LOOKS and waited_s > self._rounds.give_up_s + self._rounds.deadline_s and not coordinator.finished:
            raise self._stuck()
        self._clock.now_s = time_s
        if time_s - self._beat_s >= self._rounds.lease_s / 3:
            self._beat()
        do()
        coordinator.tick()
        check_alive(self._federation, coordinator)
        if coordinator.state.round > self._committed:
            self._committed, self._committed_s, self._last_look = coordinator.state.round, time_s, False
        return True

    def expect(self, index: int, sessions: Iterator[Session]) -> None:
        """Let a client come for the next of its sessions, if there is one."""
        session = next(sessions, None)
        if session is not None:
            self._at(session.start_s, _CLIENTS, index, partial(self._arrive, index, session, sessions))

    def _arrive(self, index: int, session: Session, sessions: Iterator[Session]) -> None:
        self._clients[index].arrive(session)
        self._next(index, self._clock(), partial(self._act, index))
        if session.end_s < math.inf:
            self._at(session.end_s, _DEPARTURES, index, partial(self._leave, index, sessions))

    def _act(self, index: int) -> None:
        client = self._clients[index]
        try:
            due_s = client.act()
        except PolicyError as error:
            log.warning("%s takes part no further from %.0f s on: %s", client.name, self._clock(), error)
            client.decline()
            return
        if due_s is not None:
            self._next(index, due_s, partial(self._act, index))
        elif not client.finished:
            self._idle.add(index)
        if client.silent_s is not None:
            self._next(index, client.silent_s, partial(self._fall_silent, index), again=True)

    def _fall_silent(self, index: int) -> None:
        self._clients[index].fall_silent()
        self._look_in(self._rounds.lease_s)

    def _leave(self, index: int, sessions: Iterator[Session]) -> None:
        if self._clients[index].finished:
            return
        self._new_turn(index)
        self._clients[index].leave()
        self._look_in(self._rounds.lease_s)
        self.expect(index, sessions)

    def _wake(self) -> None:
        """Called by the coordinator: it has something to tell those who wait."""
        self._woken = True

    def _pass_word(self) -> None:
        """Tell those who work for nothing, and let those who wait ask again."""
        if self._woken:
            self._look_in(self._rounds.deadline_s)  # a round may have opened
            self._beat()
        if self._woken or self._looking:
            for index in sorted(self._idle):
                self._next(index, self._clock(), partial(self._act, index))
        self._woken = self._looking = False

    def _beat(self) -> None:
        """Signs of life, as often as a lease needs them, and what is heard in return."""
        self._beat_s = self._clock()
        for index, client in enumerate(self._clients):
            if client.there and not client.finished and client.hear():
                self._next(index, self._clock(), partial(self._act, index))

    def _look_in(self, seconds: float) -> None:
        """The coordinator is to look at its clock once so many seconds have passed."""
        self._at(self._clock() + seconds + _MOMENT_S, _LOOKS, -1, self._look)

    def _look(self) -> None:
        self._looking = True

    def _look_once_more(self) -> None:
        """Nobody will do anything any more: what is left is that the coordinator runs out of patience."""
        if self._last_look:
            raise self._stuck()
        self._last_look = True
        self._look_in(0.0)
        self._look_in(self._rounds.give_up_s)

    def _stuck(self) -> FedloomError:
        progress = self._coordinator.progress
        there = sum(each.there and not each.finished for each in self._clients)
        return FedloomError(
            f"round {progress.round + 1} of {progress.rounds} does not end: at {self._clock():,.0f} s of virtual time "
            f"it has {len(progress.submitted)} of the {progress.needed} updates it needs, and {there} of "
            f"{len(self._clients)} clients are there. {ASSIGNMENTS_FILE} in the run folder says what became of their "
            "work; lower rounds.min_clients or what a step takes, or let clients stay for longer"
        )

    def _next(self, index: int, time_s: float, do: Callable[[], None], *, again: bool = False) -> None:
        """What a client does next, in place of what it would have done; `again`: beside that, should it come first."""
        if not again:
            self._new_turn(index)
        turn = self._turns[index]

        def run() -> None:
            if turn == self._turns[index]:
                do()

        self._at(time_s, _CLIENTS, index, run)

    def _new_turn(self, index: int) -> None:
        self._turns[index] += 1
        self._idle.discard(index)

    def _at(self, time_s: float, rank: int, index: int, do: Callable[[], None]) -> None:
        cycle = 0 if time_s > self._clock() else self._cycle + (index <= self._index)
        heappush(self._queue, (time_s, rank, cycle, index, next(self._serial), do))
