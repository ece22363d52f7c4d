"""The client's life: join, ask for work, train, submit, until the run is over."""

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from fedloom.client.config import Policy, check_spec
from fedloom.client.connection import Connection
from fedloom.client.secagg import Delivery, check_assignment, membership
from fedloom.client.training import Training
from fedloom.proto.codec import codec
from fedloom.proto.errors import FedloomError, PolicyError, ProtocolError, SchemaError, Unavailable, UpdateRejected
from fedloom.proto.messages import Assignment, Finished, Joined, UpdateHeader, Wait, broadcast_schema, upload_schema

__all__ = ["Participant"]

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")

_HEARTBEAT_S = 5.0
_BACKOFF_S = (0.25, 5.0)


@dataclass(frozen=True)
class _Pending:
    """An update that is finished and must reach the coordinator as it is, however often it takes."""

    header: UpdateHeader
    payload: bytes
    delivery: Delivery | None = None
    """Hands it in as part of a secure sum; None sends it openly."""


class Participant:
    """One client in one run.

    Args:
        connection: Line to the coordinator.
        policy: The site's policy.
        prepare: Makes the trainer once the run is known and allowed; the base model is loaded here, once.
    """

    def __init__(self, connection: Connection, policy: Policy, prepare: Callable[[Joined], Training]) -> None:
        self.connection, self.policy = connection, policy
        self.rounds_trained = 0
        self._prepare = prepare
        self._trainer: Training | None = None
        self._joined: Joined | None = None
        self._pending: _Pending | None = None
        self._training = threading.Event()

    @property
    def name(self) -> str:
        """The client's name in the run."""
        return self.policy.client.name

    def join(self) -> Joined:
        """Learn about the run, check it against the policy and get ready to train.

        Raises:
            PolicyError: The policy refuses the run; the coordinator is told that this client leaves.
            SchemaError: The run's schema is not the one the base model gives here.
        """
        if self._trainer is None:
            first = self.connection.join(self.name, 0)
            with self._leaving_on(FedloomError):
                check_spec(self.policy, first.spec)
                trainer = self._prepare(first)
                _check_schema(trainer, first)
            self._trainer, self._joined = trainer, first
        # Joining again tells the declared size, which is known once the data set is read.
        joined = self.connection.join(self.name, self._trainer.declared_examples)
        with self._leaving_on(FedloomError):
            _check_same_run(self._joined, joined)
        self._joined = joined
        return joined

    def step(self) -> Finished | None:
        """Ask once for work and do it.

        Returns:
            The end of the run, or None while it goes on.
        """
        if self._pending is not None:
            with self._leaving_on(PolicyError):
                self._deliver()
            return None
        answer = self._insist(self.connection.work)
        if isinstance(answer, Finished):
            return answer
        if isinstance(answer, Wait):
            time.sleep(answer.retry_after_s)
            return None
        with self._leaving_on(PolicyError):
            self._pending = self._train(answer)
            self._deliver()
        return None

    def run(self, *, patience_s: float = 300.0) -> Finished:
        """Join and work until the run is over, through coordinator restarts and network loss.

        Args:
            patience_s: Give up when the coordinator cannot be reached for so long.

        Raises:
            Unavailable: Patience ran out.
            ProtocolError: The coordinator goes on refusing this client after it has joined again.
            PolicyError: The policy refuses the run, or the privacy budget is spent.
        """
        last_contact, attempt, joined = time.monotonic(), 0, False
        with self._heartbeats():
            while True:
                try:
                    if not joined:
                        self.join()
                        joined = True
                    finished = self.step()
                    last_contact, attempt = time.monotonic(), 0
                    if finished is not None:
                        with suppress(Unavailable, ProtocolError):
                            self.connection.leave("run over")
                        return finished
                except Unavailable as error:
                    if time.monotonic() - last_contact > patience_s:
                        raise
                    attempt, joined = attempt + 1, False
                    pause = random.uniform(0, min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**attempt))  # full jitter
                    log.warning("%s; trying again in %.1f s", error, pause)
                    time.sleep(pause)

    def _train(self, assignment: Assignment) -> _Pending:
        trainer, joined = self._trainer, self._joined
        assert trainer is not None  # step is only called after join
        assert joined is not None
        check_assignment(joined.spec, assignment)
        secure = joined.spec.secure_aggregation
        member = membership(self.policy, joined.spec) if secure.enabled else None
        incoming = codec(assignment.broadcast_codec)
        outgoing = secure.fixed_point if secure.enabled else codec(assignment.upload_codec)
        schema = broadcast_schema(joined.schema, assignment)
        if incoming.encoded_size(schema) != assignment.broadcast_bytes:
            raise ProtocolError(
                f"broadcast of {assignment.broadcast_bytes} bytes; {incoming.name} under the schema needs "
                f"{incoming.encoded_size(schema)}"
            )
        self._training.set()
        try:
            payload = self._insist(
                lambda: self.connection.fetch(assignment.broadcast_digest, assignment.broadcast_bytes)
            )
            trained = trainer.train(joined.run, assignment, incoming.decode(schema, payload))
            upload = upload_schema(joined.schema, assignment)
            body = outgoing.encode(upload, trained.delta)
            digest = hashlib.sha256(body).hexdigest()
            trainer.release(trained, digest)
        finally:
            self._training.clear()
        header = UpdateHeader(self.name, assignment.round, upload.digest, assignment.upload_codec, len(body), digest)
        return _Pending(header, body, Delivery(member, header, body) if member else None)

    def _deliver(self) -> None:
        """Send the pending update; it is forgotten once the coordinator has it or no longer wants it.

        Part of a secure sum, it may take several calls.
        """
        pending = self._pending
        assert pending is not None  # callers check
        try:
            if not self._insist(lambda: self._send(pending)):
                return
            self.rounds_trained += 1
        except (UpdateRejected, ProtocolError) as error:
            log.warning("round %d: update not taken: %s", pending.header.round + 1, error)
        self._pending = None

    def _send(self, pending: _Pending) -> bool:
        """Whether the update is where it belongs."""
        if pending.delivery is None:
            self.connection.submit(pending.header, pending.payload)
            return True
        assert self._joined is not None  # there is an update
        self._training.set()  # the masks of a large adapter take longer than a lease
        try:
            return pending.delivery.advance(self.connection, self._joined)
        finally:
            self._training.clear()

    def _insist(self, call: Callable[[], Reply]) -> Reply:
        """Make a call; if it is refused, join and make it once more.

        A coordinator that has restarted refuses its clients until they join its new epoch.
        """
        try:
            return call()
        except ProtocolError as error:
            log.info("%s; joining again", error)
            self.join()
            return call()

    @contextmanager
    def _leaving_on(self, kind: type[FedloomError]) -> Iterator[None]:
        """On an error of `kind`, tell the coordinator not to wait; the error goes on.

        The peer learns the kind of refusal, not its text: that may name files of this site.
        """
        try:
            yield
        except kind as error:
            # A line that fails now must not hide why the client leaves; the lease runs out on its own.
            with suppress(Unavailable, ProtocolError):
                self.connection.leave(f"refused: {type(error).__name__}")
            raise

    @contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Keep the lease alive from a thread of its own whenever training holds this one."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_HEARTBEAT_S):
                if not self._training.is_set():
                    continue
                try:
                    self.connection.heartbeat()
                except FedloomError as error:
                    log.info("heartbeat: %s", error)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _check_same_run(known: Joined | None, joined: Joined) -> None:
    """Refuse a coordinator that comes back with another run than the one this client checked and prepared for."""
    if known is None or (joined.spec, joined.schema) != (known.spec, known.schema):
        raise ProtocolError("the coordinator changed the run while this client was away; start the client anew")


def _check_schema(trainer: Training, joined: Joined) -> None:
    """Refuse to train when the base model here does not give the run's schema."""
    if trainer.schema.digest != joined.schema.digest:
        raise SchemaError(
            f"the run's adapter has {len(joined.schema.tensors)} tensors (schema {joined.schema.digest[:12]}), this "
            f"base model gives {len(trainer.schema.tensors)} (schema {trainer.schema.digest[:12]}); use "
            "the base model and adapter section that the run names"
        )
