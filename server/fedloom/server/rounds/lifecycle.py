"""The course of a run: what is decided when, on which clock, and who is told of it."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, ProtocolError, StrategyError, UpdateRejected
from fedloom.core.schema import Schema, Tensors
from fedloom.server.monitoring.progress import Progress, warn_if_short
from fedloom.server.monitoring.waiting import Patience, waiting
from fedloom.server.rounds.broadcast import codecs_of
from fedloom.server.rounds.clock import Attentive, Busy
from fedloom.server.rounds.evaluation import federated_score
from fedloom.server.rounds.membership import Members
from fedloom.server.rounds.run_log import History
from fedloom.server.rounds.state import ClientLost, LostReason, RoundOpened, Rounds, RunEnded
from fedloom.server.secagg.lifecycle import Secure
from fedloom.server.storage.api import Storage
from fedloom.server.storage.audit_log import Audit
from fedloom.server.validate_config import check_config
from fedloom.strategies.api import State, Strategy

__all__ = ["Course"]

_log = logging.getLogger(__name__)


class Course:
    """One run on one state directory. Opening the same directory again goes on where the log ends.

    Args:
        config: The run file.
        schema: The run's schema.
        strategy: Plans and folds; built by the caller from [strategy] of the run file.
        store: The run's state, open; it stays the caller's to close.
        starting: The adapter before the first round; not looked at when the run goes on.
        clock: Seconds from any origin, never going back. Leases and deadlines are measured with it, and start
            anew when the coordinator does. A clock that stands still switches both off. None takes `Attentive`, for
            which a third of a lease is the longest step, and which skips the time for which the lock is held.
        expect: Clients that must be live before the first round of this run opens, if more than [rounds]
            min_clients; a simulation knows how many there will be.

    Attributes:
        config, folder: The run file, and the state directory.
        audit: Takes notes for the audit log, from any thread; they are written with the next tick.
        wake: Called without arguments, off the lock, when a waiting client may have an answer: a round has
            opened or the run is over.
        say: Called off the lock with a line for people: who is asked, who refuses, what the run waits for.
        on_commit: Called off the lock with the number of committed rounds and the state after the last of them, in
            order.
        run_commit: Runs the commit of a round that was closed, off the lock: at once, in the thread whose call closed
            it, unless a server has a thread for that. Meanwhile everybody is answered, and nobody gets work.

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
        clock: Callable[[], float] | None = None,
        expect: int = 0,
    ) -> None:
        check_config(config, strategy)
        self.wake: Callable[[], None] = lambda: None
        self.on_commit: Callable[[int, State], None] = lambda rounds, state: None
        self.run_commit: Callable[[Callable[[], None]], None] = lambda commit: commit()
        self.config, self._schema, self._strategy, self._store = config, schema, strategy, store
        self._spec = config.spec
        self._clock, self._expect = clock or Attentive(config.rounds.lease_s / 3), expect
        self._lock = Busy(self._clock.skip if isinstance(self._clock, Attentive) else lambda: None)
        self._hooks, self._uncommitting = threading.RLock(), threading.Event()
        self._uncommitting.set()
        self._committed: list[tuple[int, State]] = []
        self.say: Callable[[str], None] = lambda line: None
        self._lines: list[str] = []
        self._patience, self._refusing = Patience(), set[str]()
        self._traffic, self._stirred, self.folder = store.traffic, False, store.folder
        self._settled: tuple[Rounds, int, bool] | None = None
        self._history = History(config, schema, strategy, store, starting=starting)
        self._codecs = codecs_of(config, schema, strategy)
        _log.info("updates are sent in %s, the adapter or its changes in %s", *self._codecs)
        self._secure = Secure(config, self._history, store)
        self.audit = Audit(store)
        self.audit.note("started", detail=f"run {self._history.run}")
        self._opened_s = self._clock()
        self._members = Members(config.rounds.lease_s, self._history.returning, self._opened_s)
        with self._lock:
            self._advance()
            self._history.write()
        self._commit()
        # The note is written with the first tick: an export opens the run too, and that starts no coordinator.

    @property
    def epoch(self) -> int:
        """How many times the state directory has been opened."""
        return self._store.epoch

    @property
    def finished(self) -> bool:
        """Whether every round is committed, or the run has ended before."""
        return self._history.finished

    @property
    def state(self) -> State:
        """The strategy's state after the last commit."""
        return self._history.state

    def result(self, state: State | None = None) -> Tensors:
        """The model of a state of this run, the newest if none is given: the adapter and what corrects the base.

        Raises:
            StrategyError: The strategy gives none that fits.
        """
        return self._history.result(self.state if state is None else state)

    @property
    def told(self) -> dict[str, float | None] | None:
        """What the clients' evaluations say of the run's result so far, see `federated_score`."""
        return federated_score(self.config, self._rounds.scored.values())

    @property
    def fault(self) -> StrategyError | None:
        """What the strategy has failed with in the open round; None if it has not."""
        return self._history.fault

    @property
    def progress(self) -> Progress:
        """What a display may show."""
        with self._lock:
            now_s = self._clock()
            live, seen, elapsed_s = self._members.live(now_s), self._members.seen_ago(now_s), now_s - self._opened_s
            told = self._patience.what, self._patience.seconds, tuple(sorted(self._refusing))
            return Progress.of(self._rounds, self.config, live, seen, self._traffic, elapsed_s, told, self._codecs)

    @property
    def over(self) -> bool:
        """Whether the run is finished and no live client still has to fetch the final adapter or to leave."""
        with self._lock:
            self._members.live(self._clock())
            return self.finished and self._members.over

    def tick(self) -> None:
        """Check leases and the deadline, and tidy the disk; call it at least a few times per lease.

        Raises:
            StoreError: The state cannot be written; the coordinator must stop.
        """
        with self._changing():
            self._advance()
            self._wait()
        self._settle()
        self._store.discard()
        self.audit.write()
        self._store.count()

    def finish(self) -> None:
        """End the run with what is committed. Clients get the adapter as after the last round.

        Raises:
            ProtocolError: No round is committed yet.
            StoreError: The state cannot be written.
        """
        while True:
            self._uncommitting.wait()
            with self._changing():
                if self._rounds.phase == "closed":
                    continue  # it ends with the round that is being committed
                if self._rounds.round == 0:
                    raise ProtocolError(
                        "no round is committed yet, so there is nothing to end with; stop the coordinator"
                    )
                if not self.finished:
                    self._end("told")
                return

    def check(self) -> None:
        """Say whether the run can go on.

        Raises:
            StoreError: The state cannot be written; the coordinator must stop.
            StrategyError: The strategy fails; likewise.
        """
        self._history.check()

    def close(self) -> None:
        """Write the last notes. Call it when nobody is served any more.

        Raises:
            StoreError: The state cannot be written.
        """
        self._history.check()  # nothing more is written to a disk that has failed
        self.audit.note("stopped", detail=f"after {self._rounds.round} rounds")
        self.audit.write(ending=True)
        self._store.count()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; on the way out write what was decided, then off the lock tell the hooks, and commit."""
        try:
            with self._lock:
                self._history.check()
                try:
                    yield
                finally:
                    self._history.write()
        finally:
            self._notify()
        self._commit()

    def _advance(self) -> None:
        """Take every decision that is due. Where nothing has changed since the last time, nothing is looked at."""
        now_s, members = self._clock(), self._members
        live, before = members.live(now_s), self._settled
        late = now_s - self._opened_s >= self._rounds.deadline_s
        settled = before is not None and before[0] is self._rounds and before[1:] == (members.changes, late)
        if settled and not self._secure.enabled:
            return
        if self._rounds.phase == "open":
            for client in sorted(self._rounds.pending & members.gone):
                self._lose(client, "lease")
            members.gone.clear()
            self._stirred = self._secure.advance(now_s - self._opened_s) or self._stirred
        if not self._secure.idle:
            return  # the sum under way ends with an event of its own, or becomes idle again
        while event := self._history.due(live, members.changes, now_s - self._opened_s, self._expect):
            self._history.record(event)
            if isinstance(event, RoundOpened):
                self._opened_s = now_s
                self._stirred = True
                if event.cohort:
                    again = " again" if event.attempt else ""
                    self._tell(f"round {event.round + 1} asks{again} {', '.join(event.cohort)}")
        self._settled = self._rounds, members.changes, now_s - self._opened_s >= self._rounds.deadline_s

    def _wait(self) -> None:
        """Say what the run waits for, and end it when that has lasted too long."""
        now_s = self._clock()
        live = self._members.live(now_s)
        needed = max(self.config.rounds.min_clients, self._expect if self._rounds.round == 0 else 0)
        what = "" if self.finished else waiting(self._rounds, live, self._refusing, self.config, needed)
        if line := self._patience.look(what, now_s):
            self._tell(line, logging.WARNING)
        if what and self._rounds.round and self._patience.seconds >= self.config.rounds.give_up_s:
            self._tell(f"nobody came for {self._patience.seconds:.0f} s (rounds.give_up_s)", logging.WARNING)
            self._end("short")

    def _end(self, reason: Literal["short", "told"]) -> None:
        done, rounds = self._rounds.round, self.config.run.rounds
        self._history.record(RunEnded(done, reason))
        self._patience.look("", self._clock())
        self._tell(f"the run ends with what is committed: {done} of {rounds} rounds", logging.WARNING)
        self._stirred = True

    def _tell(self, line: str, level: int = logging.INFO) -> None:
        """Say something to people, in the log at once and elsewhere off the lock."""
        _log.log(level, "%s", line)
        self._lines.append(line)

    def _settle(self) -> None:
        """Unmask the sum whose shares are there. That takes time, so it is done off the lock, by whoever is first."""
        with self._lock:
            given = self._secure.claim()
        if given is not None:
            event = self._secure.unmask(given)
            with self._changing():
                if self.finished:
                    return  # it was ended meanwhile
                self._secure.settle(given, event)
                self._advance()

    def _commit(self) -> None:
        """See to it that a closed round is committed, unless somebody is at it."""
        if self._rounds.phase != "closed":
            return
        with self._lock:
            if self._rounds.phase != "closed" or not self._uncommitting.is_set():
                return
            self._uncommitting.clear()
        self.run_commit(self._commit_closed)

    def _commit_closed(self) -> None:
        try:
            after = self._history.next_state()
            with self._changing():
                self._history.commit(after)
                self._uncommitting.set()
                self._committed.append((after.state.round, after.state))
                self._stirred = self._stirred or self.finished
                self._advance()  # the clock is looked at anew: whoever is asked next is asked now
        finally:
            self._uncommitting.set()

    def _notify(self) -> None:
        with self._lock:
            stirred, self._stirred = self._stirred, False
            lines, self._lines = self._lines, []
        if stirred:
            self.wake()
        if self._committed:
            with self._hooks:
                with self._lock:
                    committed, self._committed = self._committed, []
                for number, state in committed:
                    self.on_commit(number, state)
        for line in lines:  # the next round begins after the last one's commit was told
            self.say(line)

    def _refuse(self, client: str, error: UpdateRejected | StrategyError | ConfigError) -> None:
        """The open round goes on without this client; it is not asked for it again."""
        self._lose(client, "rejected")
        self.audit.note("rejected", client, str(error))
        if not isinstance(error, UpdateRejected):
            self._history.failing(client, error)

    def _lose(self, client: str, reason: LostReason) -> None:
        self._history.record(ClientLost(self._rounds.round, client, reason))
        warn_if_short(self._rounds, self.config.rounds.min_clients)

    @property
    def _rounds(self) -> Rounds:
        return self._history.rounds
