"""The coordinator: one run, its log and its clients, behind plain calls that any thread may make.

The gRPC servicer and the in-process simulation make the same calls. Nothing here blocks on a client; the
caller polls `work` and `tick`, or is told by the hooks `wake` and `on_commit`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from fedloom.proto.errors import ConfigError, ProtocolError, UpdateRejected
from fedloom.proto.messages import Answer, Joined, Standing, UpdateHeader, Wait
from fedloom.proto.run import RunConfig
from fedloom.proto.schema import Schema, Tensors
from fedloom.proto.secagg.steps import StepMessage, StepResult
from fedloom.proto.spending import faint
from fedloom.server.admission import admitted, check_config, check_join, check_room, check_work
from fedloom.server.audit import Audit
from fedloom.server.history import History
from fedloom.server.members import Member, Members
from fedloom.server.progress import Progress, Traffic, warn_if_short
from fedloom.server.rounds import ClientLost, LostReason, RoundClosed, Rounds, UpdateAccepted
from fedloom.server.secure import Secure
from fedloom.server.storage import Storage
from fedloom.server.submission import check_payload, decoded
from fedloom.strategies.api import State, Strategy

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)


class Coordinator:
    """One run on one state directory. Opening the same directory again goes on where the log ends.

    Args:
        config: The run file.
        schema: The run's schema.
        strategy: Plans and folds; built by the caller from [strategy] of the run file.
        store: The run's state, open; it stays the caller's to close.
        starting: The adapter before the first round; not looked at when the run goes on.
        clock: Seconds from any origin, never going back. Leases and deadlines are measured with it, and start
            anew when the coordinator does. A clock that stands still switches both off.
        expect: Clients that must be live before the first round of this run opens, if more than [rounds]
            min_clients; a simulation knows how many there will be.

    Attributes:
        config, folder: The run file, and the state directory.
        audit: Takes notes for the audit log, from any thread; they are written with the next tick.
        wake: Called without arguments, off the lock, when a waiting client may have an answer: a round has
            opened or the run is over.
        on_commit: Called off the lock with the number of committed rounds and the state after the last of them, in
            order. It delays only the call that closed the round.

    Raises:
        ConfigError: The run file contradicts itself, or the directory holds another run.
        StoreError: The state cannot be read or written.
    """

    def __init__(
        self,
        config: RunConfig,
        schema: Schema,
        strategy: Strategy,
        store: Storage,
        *,
        starting: Tensors,
        clock: Callable[[], float] = time.monotonic,
        expect: int = 0,
    ) -> None:
        check_config(config, strategy)
        self.wake: Callable[[], None] = lambda: None
        self.on_commit: Callable[[int, State], None] = lambda rounds, state: None
        self.config, self._schema, self._strategy, self._store = config, schema, strategy, store
        self._clock, self._expect = clock, expect
        self._lock, self._hooks = threading.RLock(), threading.RLock()
        self._committed: list[tuple[int, State]] = []
        self._traffic, self._stirred, self.folder = Traffic(), False, store.folder
        self._settled: tuple[Rounds, int, bool] | None = None
        self._history = History(config, schema, strategy, store, starting=starting)
        self._secure = Secure(config, self._history, store)
        self.audit = Audit(store)
        self.audit.note("started", detail=f"run {self._history.run}")
        self._opened_s = clock()
        self._members = Members(config.rounds.lease_s, self._history.returning, self._opened_s)
        with self._lock:
            self._advance()
            self._history.write()
        self.audit.write()

    @property
    def epoch(self) -> int:
        """How many times the state directory has been opened."""
        return self._store.epoch

    @property
    def finished(self) -> bool:
        """Whether every round is committed."""
        return self._rounds.round >= self.config.run.rounds

    @property
    def state(self) -> State:
        """The strategy's state after the last commit."""
        return self._history.state

    @property
    def progress(self) -> Progress:
        """What a display may show."""
        with self._lock:
            now_s = self._clock()
            live, seen, elapsed_s = self._members.live(now_s), self._members.seen_ago(now_s), now_s - self._opened_s
            return Progress.of(self._rounds, self.config, live, seen, self._traffic, elapsed_s)

    @property
    def over(self) -> bool:
        """Whether the run is finished and no live client still has to fetch the final adapter or to leave."""
        with self._lock:
            self._members.live(self._clock())
            return self.finished and self._members.over

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
            if declared_examples and (drowned := faint(self.config.spec, declared_examples)):
                _log.warning("client %r: %s", client, drowned)
        return Joined(run=self._history.run, epoch=self.epoch, spec=self.config.spec, schema=self._schema)

    def work(self, client: str, run: str, epoch: int) -> Answer:
        """What this client should do now. Asking counts it among the live.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here.
            ConfigError: The strategy plans what the run file rules out.
        """
        with self._changing():
            member = self._admit(client, run, epoch)
            check_work(self.config, client, member.declared_examples)
            self._members.asks(client)
            member.served = member.served and self.finished
            self._advance()
            if self.finished:
                return self._history.final[0]
            if self._secure.idle and (assignment := self._history.assign(client)):
                return assignment
            return Wait(retry_after_s=0.0)

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
            member.served = member.served or self.finished
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
        client, rejection = header.client, None
        with ExitStack() as landing:
            with self._lock:
                landing.enter_context(self._history.arriving(header.digest))
                order, update, limit = self._history.draft(client, self._members[client].declared_examples)
                state = self.state
            try:
                update = decoded(self._strategy, state, order, payload, update, limit)
                self._store.put_blob(payload, header.digest)
            except UpdateRejected as error:
                rejection = error
            with self._changing():
                landing.close()
                self._admit(client, run, epoch)
                if self._history.expected(header) is None:
                    return True
                self._traffic.up(header.round, client, len(payload))
                if rejection is None:
                    accepted = UpdateAccepted(header.round, client, header.digest, update.weight, header.score)
                    self._history.record(accepted)
                    self._history.keep(update)
                else:
                    self._lose(client, "rejected")
                    self.audit.note("rejected", client, str(rejection))
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

    def heartbeat(self, client: str, run: str, epoch: int) -> Standing:
        """Keep the client's lease; how the run stands, so that it need not train for a round that is over.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here.
        """
        with self._lock:
            self._admit(client, run, epoch)
            return self._history.standing

    def leave(self, client: str, reason: str, run: str, epoch: int) -> None:
        """Do not wait for this client. It may come back by asking for work.

        Raises:
            ProtocolError: The run, the epoch or the client is not known here.
        """
        with self._changing():
            self._admit(client, run, epoch)
            self._members.leaves(client)
            _log.info("client %r leaves: %.200r", client, reason)
            if self._rounds.phase == "open" and client in self._rounds.pending:
                self._lose(client, "left")
            self._advance()

    def tick(self) -> None:
        """Check leases and the deadline, and tidy the disk; call it at least a few times per lease.

        Raises:
            StoreError: The state cannot be written; the coordinator must stop.
        """
        with self._changing():
            self._advance()
        self._settle()
        self._store.discard()
        self.audit.write()

    def close(self) -> None:
        """Write the last notes. Call it when nobody is served any more.

        Raises:
            StoreError: The state cannot be written.
        """
        self._history.check()  # nothing more is written to a disk that has failed
        self.audit.note("stopped", detail=f"after {self._rounds.round} rounds")
        self.audit.write(ending=True)

    @contextmanager
    def _noting(self, client: str) -> Iterator[None]:
        """Take a note of a message that is refused."""
        try:
            yield
        except (ProtocolError, ConfigError, UpdateRejected) as error:
            self.audit.note("refused", client, str(error))
            raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; on the way out write what was decided, then tell the hooks off the lock."""
        try:
            with self._lock:
                self._history.check()
                try:
                    yield
                finally:
                    self._history.write()
        finally:
            self._notify()

    def _advance(self) -> None:
        """Take every decision that is due. Where nothing has changed since the last time, nothing is looked at."""
        now_s = self._clock()
        live = self._members.live(now_s)
        if self._rounds.phase == "closed":
            self._commit()
        standing = self._rounds, self._members.changes, now_s - self._opened_s >= self._rounds.deadline_s
        if standing == self._settled and not self._secure.enabled:
            return
        if self._rounds.phase == "open":
            for client in sorted(self._rounds.pending - live):
                self._lose(client, "lease")
            self._stirred = self._secure.advance(now_s - self._opened_s) or self._stirred
        if not self._secure.idle:
            return  # the sum under way ends with an event of its own, or becomes idle again
        while event := self._history.due(live, now_s - self._opened_s, self._expect):
            self._history.record(event)
            if isinstance(event, RoundClosed):
                self._history.write()  # on disk before it is acted on
                self._commit()
            else:
                self._opened_s = now_s
                self._stirred = True
        self._settled = self._rounds, self._members.changes, now_s - self._opened_s >= self._rounds.deadline_s

    def _settle(self) -> None:
        """Unmask the sum whose shares are there. That takes time, so it is done off the lock, by whoever is first."""
        with self._lock:
            given = self._secure.claim()
        if given is not None:
            event = self._secure.unmask(given)
            with self._changing():
                self._secure.settle(given, event)
                self._advance()

    def _commit(self) -> None:
        number = self._rounds.round
        self._committed.append((number + 1, self._history.commit()))
        self._stirred = self._stirred or self.finished

    def _notify(self) -> None:
        with self._lock:
            stirred, self._stirred = self._stirred, False
        if stirred:
            self.wake()
        if self._committed:
            with self._hooks:
                with self._lock:
                    committed, self._committed = self._committed, []
                for number, state in committed:
                    self.on_commit(number, state)

    def _admit(self, client: str, run: str, epoch: int) -> Member:
        """The member behind a message, whose lease begins anew."""
        self._history.check()
        return admitted(self._members, client, (run, epoch), (self._history.run, self.epoch), self._clock())

    def _lose(self, client: str, reason: LostReason) -> None:
        self._history.record(ClientLost(self._rounds.round, client, reason))
        warn_if_short(self._rounds, self.config.rounds.min_clients)

    @property
    def _rounds(self) -> Rounds:
        return self._history.rounds
