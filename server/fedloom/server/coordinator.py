"""The coordinator: one run, its log and its clients, behind plain calls that any thread may make.

The gRPC servicer and the in-process simulation make the same calls. Nothing here blocks on a client; the
caller polls `work` and `tick`, or is told by the hooks `wake` and `on_commit`.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fedloom.core.errors import ConfigError, ProtocolError, StrategyError, UpdateRejected
from fedloom.core.privacy.spends import faint
from fedloom.proto.messages import (
    REFUSED,
    Answer,
    Assignment,
    Joined,
    RoundStatus,
    StepMessage,
    StepResult,
    UpdateHeader,
    Wait,
)
from fedloom.server.monitoring.waiting import refusal
from fedloom.server.rounds.lifecycle import Course
from fedloom.server.rounds.membership import Member
from fedloom.server.rounds.state import ResultScored, UpdateAccepted
from fedloom.server.rounds.validation import check_payload, check_result_score, decoded
from fedloom.server.validate_config import admitted, check_join, check_room, check_work

__all__ = ["Coordinator"]

_ELSE = "the round goes on without it, see the coordinator's log"
_log = logging.getLogger(__name__)


class Coordinator(Course):
    """What clients may call of a run's course: see `Course`, which says what it is made of."""

    def join(self, client: str, protocol: int, declared_examples: int) -> Joined:
        """What a client needs to know about the run. Joining again is allowed and changes its declaration.

        Raises:
            ProtocolError: The name is not one, another protocol version is spoken, or the run is full.
            ConfigError: The run weighs clients by examples and this one declares none, or too many.
        """
        with self._lock, self._noting(client):
            self._history.check()
            check_join(client, protocol, declared_examples)
            check_room(client, self._members)
            if self._members.join(client, declared_examples, self._clock()):
                self.audit.note("joined", client)
            if declared_examples and (drowned := faint(self._spec, declared_examples)):
                _log.warning("client %r: %s", client, drowned)
        return Joined(run=self._history.run, epoch=self.epoch, spec=self._spec, schema=self._schema)

    def work(self, client: str, run: str, epoch: int, held: str = "") -> Answer:
        """What this client should do now. Asking counts it among the live.

        Args:
            client: Who asks.
            run: The run it joined.
            epoch: The epoch it joined in.
            held: Digest of the adapter that it has from an earlier round; "" for none.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here.
            ConfigError: The strategy plans what the run file rules out.
            StrategyError: The strategy has failed for all; the coordinator must stop.
        """
        with self._changing():
            member = self._admit(client, run, epoch)
            check_work(self.config, client, member.declared_examples)
            self._members.asks(client)
            self._refusing.discard(client)
            member.served = member.served and self.finished
            self._advance()
            if self.finished:
                return self._history.final[0]
            if self._secure.idle and (assignment := self._assigned(client, held)):
                return assignment
            return Wait(retry_after_s=0.0)

    def _assigned(self, client: str, held: str) -> Assignment | None:
        """What this client is to do; the round goes on without one for whom the strategy has no plan."""
        try:
            return self._history.assign(client, held)
        except (ConfigError, StrategyError) as error:
            self._refuse(client, error)
            if isinstance(error, ConfigError):
                raise  # in words that this client may read
            self._advance()
            return None

    def blob(self, client: str, digest: str, run: str, epoch: int, offset: int = 0) -> bytes:
        """The whole payload with this digest, if it is this client's to fetch: its broadcast, or the final adapter.

        Args:
            client: Who asks.
            digest: From its assignment or from `Finished`.
            run: The run it joined.
            epoch: The epoch it joined in.
            offset: Where the caller goes on, in bytes; only the rest is counted as sent.

        Raises:
            ProtocolError: It is not, or the offset lies beyond the end.
        """
        with self._lock:
            member = self._admit(client, run, epoch)
            payload = self._history.payload(client, digest)
            if payload is None:
                raise ProtocolError(f"client {client[:64]!r} may not fetch {digest[:12]!r} now; ask for work first")
            if not 0 <= offset <= len(payload):
                raise ProtocolError(f"offset {offset} lies beyond the payload of {len(payload)} bytes; start from 0")
            self._traffic.down(self._rounds.round, client, len(payload) - offset)
            # Where the result is scored, a client has more to say once it has fetched it.
            member.served = member.served or (self.finished and not self.config.federated_evaluation.enabled)
            return payload

    def check_header(self, header: UpdateHeader, run: str, epoch: int) -> int | None:
        """The exact length of the payload that must follow, in bytes, before any of it is read.

        Returns:
            None when exactly this update was accepted before, in this round or an earlier one: nothing need
            follow.

        Raises:
            ProtocolError: The update fits neither the run nor its open round.
        """
        with self._lock, self._noting(header.client):
            self._admit(header.client, run, epoch)
            return self._history.expected(header)

    def submit(self, header: UpdateHeader, payload: bytes, run: str, epoch: int) -> bool:
        """Take an update; when the call returns it is durable.

        Returns:
            True when exactly this update had been accepted before.

        Raises:
            ProtocolError: The update fits neither the run nor its open round, nor its own header.
            UpdateRejected: It holds NaN or Inf, or the strategy refuses it. The round goes on without it.
        """
        expected = self.check_header(header, run, epoch)
        if expected is None:
            return True
        check_payload(header, payload, expected)
        if self._secure.enabled:
            with self._changing():
                self._admit(header.client, run, epoch)
                self._traffic.up(header.round, header.client, len(payload))
                repeated = self._secure.add(header, payload)
                self._advance()
            return repeated
        rejection = self._take(header, payload, run, epoch)
        self._store.discard()  # at once, for the next round's files to take over their memory
        if isinstance(rejection, UpdateRejected):
            raise rejection
        return rejection

    def _take(self, header: UpdateHeader, payload: bytes, run: str, epoch: int) -> UpdateRejected | bool:
        """Record an update whose payload is the announced one; why it was refused, or whether it was there before."""
        client = header.client
        rejection: UpdateRejected | None = None
        why: UpdateRejected | StrategyError | None = None
        with ExitStack() as landing:
            with self._lock:
                if self._history.expected(header) is None:
                    return True  # it came twice, and the other one was quicker
                landing.enter_context(self._history.arriving(header.digest))
                asked, upload, update, limit = self._history.draft(header, self._members[client].declared_examples)
                state = self.state
            try:
                update = decoded(
                    self.config.strategy.name, self._strategy, state, asked, upload, payload, update, limit
                )
                self._store.put_blob(payload, header.digest)
            except UpdateRejected as error:
                rejection = why = error
            except StrategyError as error:
                why, rejection = (
                    error,
                    UpdateRejected(f"the strategy fails on the update of client {client!r}; {_ELSE}"),
                )
            with self._changing():
                landing.close()
                self._admit(client, run, epoch)
                if self._history.expected(header) is None:
                    return True
                self._traffic.up(header.round, client, len(payload))
                if why is None:
                    accepted = UpdateAccepted(
                        header.round, client, header.digest, update.weight, header.score, update.noise_std
                    )
                    self._history.record(accepted)
                    self._history.keep(update)
                else:
                    self._refuse(client, why)
                # Where only so many may be at work, another client may have its turn now.
                self._stirred = self._stirred or self.config.rounds.concurrency is not None
                self._advance()
        return rejection or False

    def exchange(self, message: StepMessage, client: str, run: str, epoch: int) -> StepResult | None:
        """A client's message in a step of a secure sum; the step's result, or None while others are missing.

        Raises:
            ProtocolError: It fits neither the run nor the open round's sum.
        """
        with self._changing():
            self._admit(client, run, epoch)
            self._secure.take(client, message)
            self._advance()
        self._settle()
        with self._lock:
            return self._secure.take(client, message)

    def heartbeat(self, client: str, run: str, epoch: int) -> RoundStatus:
        """Keep the client's lease; how the run stands, so that it need not train for a round that is over.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here.
        """
        with self._lock:
            self._admit(client, run, epoch)
            return self._history.standing

    def leave(self, client: str, reason: str, run: str, epoch: int, score: tuple[float, ...] = ()) -> None:
        """Do not wait for this client. It may come back by asking for work.

        Args:
            client: Who leaves.
            reason: Why, for the log.
            run: The run it joined.
            epoch: The epoch it joined in.
            score: At the end, what its evaluation of the result released. Its first one counts.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here, or nobody asked for such a score.
        """
        with self._changing():
            self._admit(client, run, epoch)
            if score:
                check_result_score(client, score, self._spec, self.finished)
                if client not in self._rounds.scored:
                    self._history.record(ResultScored(self._rounds.round, client, score))
            self._members.leaves(client)
            _log.info("client %r leaves: %.200r", client, reason)
            if reason == REFUSED:
                self._refusing.add(client)
                self.audit.note("declined", client, "the client refuses the run; its own log says why")
                self._tell(refusal(client, self._rounds.round), logging.WARNING)
            if self._rounds.phase == "open" and client in self._rounds.pending:
                self._lose(client, "left")
            self._advance()

    @contextmanager
    def _noting(self, client: str) -> Iterator[None]:
        """Take a note of a message that is refused."""
        try:
            yield
        except (ProtocolError, ConfigError, UpdateRejected) as error:
            self.audit.note("refused", client, str(error))
            raise

    def _admit(self, client: str, run: str, epoch: int) -> Member:
        """The member behind a message, whose lease begins anew."""
        self._history.check()
        return admitted(self._members, client, (run, epoch), (self._history.run, self.epoch), self._clock())
