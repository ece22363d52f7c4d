"""A site's resident trainer: it keeps the model loaded, and does for one message what a client does for one assignment.

The work is the participant's own: the policy is asked first, the round is charged before it is computed, the update is
stored in the outbox and noted in the ledger before it is handed over. What differs is that Flower acknowledges
nothing. An update counts as arrived only when the next round is asked for, or the run is over; until then the same
bytes go out again.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from fedloom.client.policy import Policy
from fedloom.client.session.api import Training
from fedloom.client.session.participant import Participant
from fedloom.client.session.send_times import AT_ONCE, Pace
from fedloom.core.errors import CodecError, FedloomError, PolicyError, ProtocolError, Unavailable
from fedloom.flower.messages import Reply, Request
from fedloom.proto.messages import (
    REFUSED,
    Answer,
    Assignment,
    Finished,
    Joined,
    RoundStatus,
    StepMessage,
    StepResult,
    UpdateHeader,
)

__all__ = ["Resident"]

log = logging.getLogger(__name__)


class _Handed(Unavailable):
    """The update is on its way, and nobody has said that it arrived."""


class _Relay:
    """The participant's line, which ends at the message that is being answered."""

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        self.declared_examples = 0
        self.handed: tuple[UpdateHeader, bytes] | None = None
        self._work: tuple[Assignment, bytes] | None = None

    def offer(self, request: Request, payload: bytes) -> None:
        """Take a message to be answered."""
        self.joined, self.handed = request.joined, None
        self._work = None if request.assignment is None else (request.assignment, payload)

    def join(self, client: str, declared_examples: int) -> Joined:
        """What the message says about the run."""
        self.declared_examples = declared_examples
        return self.joined

    def work(self, held: str = "") -> Answer:
        """The message's assignment, or the end of the run."""
        return self._work[0] if self._work else Finished(0, "fp32", "", 0)

    def fetch(self, digest: str, size_bytes: int) -> bytes:
        """The message's payload or the part of it that one link has, if it is what the assignment names."""
        asked, payload = self._work or (None, b"")
        start = 0
        for link in asked.links if asked else ():
            if link.digest == digest:
                payload = payload[start : start + link.bytes]
                break
            start += link.bytes
        if len(payload) != size_bytes or hashlib.sha256(payload).hexdigest() != digest:
            raise CodecError(
                f"payload {digest} arrived with {len(payload)} of {size_bytes} bytes or with other content"
            )
        return payload

    def submit(self, header: UpdateHeader, payload: bytes) -> bool:
        """Hand the update over, or hear from a later message that it had arrived."""
        if self._work is None or header.round < self._work[0].round:
            return True
        if header.round > self._work[0].round:
            raise PolicyError(
                f"round {self._work[0].round + 1} is asked for after round {header.round + 1} was answered; no round "
                "is answered twice"
            )
        self.handed = header, payload
        raise _Handed("waiting for the next round")

    def exchange(self, message: StepMessage) -> StepResult | None:
        """Flower has no secure sums here."""
        raise ProtocolError("a secure sum needs the gRPC engine; set secure_aggregation.enabled = false")

    def heartbeat(self) -> RoundStatus:
        """How the run stood when the message left. Flower watches its nodes itself, and nobody calls this."""
        round = self._work[0].round if self._work else 0
        return RoundStatus(round, True, round)

    def leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        """The reply says it; results are not scored in this engine."""


class Resident:
    """One site, for whatever run asks; the model of the last one stays loaded.

    Args:
        policy: The site's policy.
        prepare: Makes the trainer once the run is known and allowed.
        outbox: Folder of finished updates; None keeps them in memory only.
        pace: When private runs are answered.
    """

    def __init__(
        self,
        policy: Policy,
        prepare: Callable[[Joined], Training],
        outbox: Path | None,
        pace: Pace = AT_ONCE,
    ) -> None:
        self._policy, self._prepare, self._outbox, self._pace = policy, prepare, outbox, pace
        self._run = ""
        self._participant: Participant | None = None
        self._relay: _Relay | None = None
        self._trainer: Training | None = None

    def answer(self, request: Request, payload: bytes) -> tuple[Reply, bytes]:
        """Do what is asked; what keeps the site from it becomes a refusal, and its text goes to the log here."""
        name = self._policy.client.name
        try:
            return self._answer(request, payload)
        except FedloomError as error:
            log.warning("run %.8s: %s: %s", request.joined.run, type(error).__name__, error)
            return Reply(name, refusal=REFUSED), b""
        except Exception:
            log.exception("run %.8s: everything is loaded anew for the next message", request.joined.run)
            self.close()
            return Reply(name, refusal=REFUSED), b""

    def close(self) -> None:
        """Let go of the model and the ledger; what is in the outbox stays."""
        trainer, self._trainer, self._participant, self._relay, self._run = self._trainer, None, None, None, ""
        ledger = getattr(trainer, "ledger", None)
        if ledger is not None:
            ledger.close()

    def _answer(self, request: Request, payload: bytes) -> tuple[Reply, bytes]:
        participant, relay = self._joined(request, payload)
        reply = Reply(self._policy.client.name, relay.declared_examples)
        if request.over:
            while participant.step() is None:
                pass
            self.close()
        elif request.assignment is not None:
            try:
                while True:
                    participant.step()
            except _Handed:
                assert relay.handed is not None  # it was raised with it
            header, update = relay.handed
            return Reply(reply.client, reply.declared_examples, header, participant.held.digest), update
        return reply, b""

    def _joined(self, request: Request, payload: bytes) -> tuple[Participant, _Relay]:
        """The participant of the request's run, with the request before it."""
        if self._run != request.joined.run:
            self.close()
        relay = self._relay or _Relay(request.joined)
        relay.offer(request, payload)
        participant = self._participant or Participant(
            relay, self._policy, self._prepared, outbox=self._outbox, pace=self._pace
        )
        try:
            participant.join()
        except BaseException:
            self.close()
            raise
        self._run, self._participant, self._relay = request.joined.run, participant, relay
        return participant, relay

    def _prepared(self, joined: Joined) -> Training:
        self._trainer = self._prepare(joined)
        return self._trainer
