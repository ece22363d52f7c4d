"""A simulated client whose work takes time, and whose process may end at any moment and begin anew."""

from collections.abc import Callable
from dataclasses import dataclass

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.account import outbox_folder
from fedloom.client.privacy.ledger.hash_chain import OVER
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.client.session.heartbeat import Timing
from fedloom.client.session.participant import Participant
from fedloom.client.training.trainer import Trainer
from fedloom.core.codecs import codec
from fedloom.core.errors import Unavailable
from fedloom.core.schema import Schema, Tensors
from fedloom.proto.messages import Answer, Assignment, Joined, UpdateHeader, Wait, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.rpc.local import LocalConnection
from fedloom.simulation.virtual_time.assignments import Assignments, Outcome, Work
from fedloom.simulation.virtual_time.devices import Device
from fedloom.simulation.virtual_time.trace import Session

__all__ = ["Client"]

_AT_ONCE = Timing(backoff_s=(0.0, 0.0))


class _OnItsWay(Unavailable):
    """An update that has left and is not there yet: to the client, a line that is cut until then."""


class _Killed(BaseException):
    """The process ends before the work is done. As with a kill, nothing that handles errors gets to see it."""


class _Line(LocalConnection):
    """A client's line to the coordinator, over which updates take time."""

    def __init__(self, coordinator: Coordinator, clock: Callable[[], float], device: Device) -> None:
        super().__init__(coordinator)
        self._clock, self._device = clock, device
        self.waiting, self.over, self.fetched_bytes = False, False, 0
        self.due_s: float | None = None
        """When the update that is on its way arrives."""

    def work(self, held: str = "") -> Answer:
        """Ask for work."""
        answer = super().work(held)
        self.waiting, self.over, self.fetched_bytes, self.due_s = isinstance(answer, Wait), False, 0, None
        return answer

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """The payload; that it takes time counts once the work is begun."""
        payload = super().fetch(digest, size_bytes)
        self.fetched_bytes += len(payload)
        return payload

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Hand in an update that has arrived. One whose round was over before is not sent: who stops sends nothing.

        Raises:
            Unavailable: It is still on its way, until `due_s`.
        """
        if self.over:
            return True
        if self.due_s is None:  # it is sent again, without work before it
            self.due_s = self._clock() + self._device.upload_s(len(payload))
        if self._clock() < self.due_s:
            raise _OnItsWay(f"the update arrives at {self.due_s:g} s")
        return super().submit(header, payload)


@dataclass
class _Timed:
    """A client's trainer. What it does is done at once, and comes to an end in virtual time, or to none."""

    trainer: Trainer
    begin: Callable[[Assignment], bool]
    """Notes that an assignment begins; whether the client lives to send its update."""

    @property
    def schema(self) -> Schema:
        """The adapter's schema."""
        return self.trainer.schema

    @property
    def declared_examples(self) -> int:
        """What the coordinator is told."""
        return self.trainer.declared_examples

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        """Do the work, or charge it and die before the first step: of what comes after it nothing would be left."""
        check = check_cancelled if self.begin(assignment) else _die
        return self.trainer.train(run, assignment, broadcast, check)

    def release(self, charge: int | None, digest: str) -> None:
        """Note what is about to leave."""
        self.trainer.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        """Give up the work that was begun last."""
        return self.trainer.drop(why)


def _die() -> None:
    raise _Killed


class Client:
    """One client through all its sessions.

    Args:
        device: What it runs on.
        policy: Its site's policy.
        coordinator: The coordinator, on the same clock.
        clock: Virtual seconds.
        trainer: Makes its trainer, once: what a process that begins anew reads from its disk again does not change.
        ended: Takes notes of assignments.

    Attributes:
        session: The one it is in, or was in last.
        there: Whether its process lives and can be heard.
        finished: Whether it has the result of the run, and left.
        silent_s: When it falls silent in the work that it has begun; None if it does not.
    """

    def __init__(
        self,
        device: Device,
        policy: Policy,
        coordinator: Coordinator,
        clock: Callable[[], float],
        trainer: Callable[[Joined], Trainer],
        assignments: Assignments,
    ) -> None:
        self.name, self.there, self.finished = device.name, False, False
        self.session = Session(0.0)
        self.silent_s: float | None = None
        self._device, self._policy, self._coordinator, self._clock = device, policy, coordinator, clock
        self._make, self._assignments = trainer, assignments
        self._trainer: Trainer | None = None
        self._work: Work | None = None
        self._lost, self._begun = False, 0
        self._taken: int | None = None
        self._start_process()

    def _start_process(self) -> None:
        """A new process: all that it knows of an earlier one is on its disk."""
        if self._trainer is not None:
            self._trainer.drop(None)
        self._line = _Line(self._coordinator, self._clock, self._device)
        self._participant = Participant(
            self._line, self._policy, self._ready, outbox=outbox_folder(self._policy), timing=_AT_ONCE
        )
        self._participant.delivered = self._delivered
        self._lost, self.silent_s = False, None

    def _ready(self, joined: Joined) -> _Timed:
        trainer = self._trainer = self._trainer or self._make(joined)
        if joined.spec.federated_evaluation.enabled:
            self._participant.ended = lambda result, rounds: trainer.score(joined.run, rounds, result)
        return _Timed(trainer, lambda assignment: self._begin(joined, assignment))

    def _begin(self, joined: Joined, assignment: Assignment) -> bool:
        device, spec = self._device, joined.spec
        step_s = device.step_s if self.session.step_s is None else self.session.step_s
        upload_bytes = codec(assignment.upload_codec).encoded_size(upload_schema(joined.schema, assignment))
        self._work = work = Work(
            self.name,
            assignment.round + 1,
            self._clock(),
            device.download_s(self._line.fetched_bytes),
            spec.train.steps * step_s,
            device.upload_s(upload_bytes),
        )
        share, self._begun = device.dropout(self._begun), self._begun + 1
        if share is not None:
            self.silent_s = work.start_s + share * (work.due_s - work.start_s)
        self._line.due_s = work.due_s
        self._lost = share is not None or self.session.end_s < work.due_s
        return not self._lost

    def arrive(self, session: Session) -> None:
        """Begin a session: join the run."""
        if self._trainer is not None:
            self._start_process()
        self.session, self.there = session, True
        self._participant.join()

    def act(self) -> float | None:
        """Do what is next: ask for work and begin it, or send what is finished.

        Returns:
            When it acts next by itself; None if it waits for the coordinator, or has nothing more to do.

        Raises:
            PolicyError: It may take part no further, and has left.
        """
        if self._lost:  # it was silent until now
            self.fall_silent()
            self._start_process()
            self.there = True
            self._participant.join()
        self._line.waiting, self._taken, committed = False, None, self._coordinator.state.round
        try:
            finished = self._participant.step()
        except (_OnItsWay, _Killed):
            return self._line.due_s
        if self._work is not None:
            counted = self._taken == self._work.round
            self._end("counted" if counted else "refused", committed + 1 - self._work.round if counted else None)
        if finished is not None:
            self._participant.conclude(finished)
            self.finished = True
        return None if self.finished or self._line.waiting else self._clock()

    def hear(self) -> bool:
        """Learn how the run stands, as by a heartbeat; whether there is work and nobody takes its update any more."""
        standing = self._line.heartbeat()
        if self._work is None or not (self._coordinator.finished or standing.oldest >= self._work.round):
            return False
        if self._lost and self._trainer is not None:
            self._trainer.drop(OVER)
        self._lost, self.silent_s, self._line.over = False, None, True
        self._end("over")
        return True

    def fall_silent(self) -> None:
        """Be heard no more, until the work would have been done."""
        self._vanish("dropped")

    def leave(self) -> None:
        """End the session, without a word."""
        self._vanish("away")

    def decline(self) -> None:
        """Take part no further, after an error of which the coordinator was told."""
        self.there, self.finished = False, True
        self._end("declined")

    def _vanish(self, outcome: Outcome) -> None:
        if self.there:
            self._line.heartbeat()  # the last one
        self.there, self.silent_s = False, None
        self._end(outcome)

    def _delivered(self, number: int) -> None:
        self._taken = number

    def _end(self, outcome: Outcome, staleness: int | None = None) -> None:
        if self._work is not None:
            self._assignments.ended(self._work, self._clock(), outcome, staleness)
        self._work = None
