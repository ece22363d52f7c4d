"""The client's life: join, ask for work, train, submit, until the run is over."""

import datetime as dt
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedloom.client.policy import Policy, check_spec
from fedloom.client.privacy.ledger.account import left_out_folder
from fedloom.client.privacy.ledger.hash_chain import FAILED, OVER
from fedloom.client.secagg.participant import Delivery, check_assignment, membership
from fedloom.client.session.api import RoundCancelled, RoundContext, Training, check_same_run, check_schema
from fedloom.client.session.assignment_checks import check_order, final_schema
from fedloom.client.session.heartbeat import USUAL, Timing, heartbeats
from fedloom.client.session.held import HeldAdapter
from fedloom.client.session.left_out import LeftOut
from fedloom.client.session.outbox import OutboxEntry, drop, keep, kept
from fedloom.client.session.payloads import packed, reader
from fedloom.client.session.send_times import AT_ONCE, Pace
from fedloom.client.session.terms import check_terms
from fedloom.client.session.training_hours import until_open_s
from fedloom.core.codecs import codec
from fedloom.core.errors import (
    ConfigError,
    FedloomError,
    IdentityError,
    LedgerError,
    ModelError,
    Overloaded,
    PolicyError,
    ProtocolError,
    SchemaError,
    Unavailable,
    UpdateRejected,
)
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.core.schema import Tensors
from fedloom.proto.messages import REFUSED, Assignment, Finished, Joined, Wait

if TYPE_CHECKING:
    from fedloom.client.transport.grpc import Connection  # without gRPC, another framework may be the line

__all__ = ["Participant"]

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")

_TOLD = (PolicyError, ModelError, SchemaError, ProtocolError, ConfigError, LedgerError)
"""What a client says that it refuses for: functions of the run, the policy, the base model and what was spent. On other
errors, which may be the data's doing, it falls silent like a machine that died."""
_MOST_REFUSALS = 3
"""How often one update may be refused for its round and asked for again: a round may close while it is on its way."""


class Participant:
    """One client in one run.

    Args:
        connection: Line to the coordinator.
        policy: The site's policy.
        prepare: Makes the trainer once the run is known and allowed; the base model is loaded here, once.
        outbox: Folder of finished updates, which a client that is started again sends again. None keeps them in memory.
        pace: When the messages of a private run leave that follow work on the data.
        timing: How long it waits between heartbeats and attempts.
    """

    def __init__(
        self,
        connection: "Connection",
        policy: Policy,
        prepare: Callable[[Joined], Training],
        *,
        outbox: Path | None = None,
        pace: Pace = AT_ONCE,
        timing: Timing = USUAL,
    ) -> None:
        self.connection, self.policy, self.outbox, self.pace, self.timing = connection, policy, outbox, pace, timing
        self.rounds_trained = self._refusals = 0
        self.delivered: Callable[[int], None] = lambda number: None
        """Called with the number of a round, from 1, once the coordinator has this client's update for it."""
        self.ended: Callable[[Tensors, int], tuple[float, ...]] | None = None
        """Gets the result of the run and how many rounds made it; figures that it returns are released."""
        self._prepare = prepare
        self.held, self._left_out = HeldAdapter(), LeftOut(left_out_folder(policy), policy.client.name)
        self._trainer: Training | None = None
        self._joined: Joined | None = None
        self._pending: OutboxEntry | None = None
        self._delivery: Delivery | None = None
        self._refused: OutboxEntry | None = None
        self._busy = threading.Event()
        self._task: RoundContext | None = None

    @property
    def name(self) -> str:
        """The client's name in the run."""
        return self.policy.client.name

    @failpoint("participant.join")
    def join(self) -> Joined:
        """Learn about the run, check it against the policy and get ready to train.

        Raises:
            PolicyError: The policy refuses the run; the coordinator is told that this client leaves.
            ProtocolError: It is not the run that was joined before.
            SchemaError: The run's schema is not the one the base model gives here.
            LedgerError: An update that waits in the outbox is damaged, or is not the one in the ledger.
        """
        if self._trainer is None:
            first = self.connection.join(self.name, 0)
            with self._leaving_on(*_TOLD):
                check_spec(self.policy, first.spec)
                with self._pace(first).preparing():
                    trainer = self._prepare(first)
                    check_schema(trainer, first)
                    self._pending = self._left_over(trainer, first.run)
            self._trainer, self._joined = trainer, first
            reach("participant.prepared")
        # Joining again tells the declared size, which is known once the data set is read.
        joined = self.connection.join(self.name, self._trainer.declared_examples)
        with self._leaving_on(ProtocolError):
            assert self._joined is not None  # it was set with the trainer
            check_same_run(self._joined, joined)
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
        answer = self._insist(lambda: self.connection.work(self.held.digest))
        if isinstance(answer, Finished):
            self._forget()
            return answer
        if isinstance(answer, Wait):
            time.sleep(answer.retry_after_s)
            return None
        if self._closed_s():
            return None  # the hours ended while it asked; `run` leaves the round to others
        with self._leaving_on(PolicyError, LedgerError):
            try:
                self._pending = self._answered(answer.round) or self._work(answer)
            except RoundCancelled as word:
                log.info("round %d: it was closed without this client; %s", answer.round + 1, word)
                time.sleep(random.uniform(0, self.timing.backoff_s[0]))
                return None
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
        with heartbeats(self.connection, self._busy, lambda: self._task, self.timing.heartbeat_s):
            while True:
                try:
                    if self._pending is None and (closed_s := self._closed_s()):
                        self._rest(closed_s, joined)
                        last_contact, joined = time.monotonic(), False
                        continue
                    if not joined:
                        self.join()
                        joined = True
                        if self._pending is None:  # a line that is cut in every poll is no coordinator that is away
                            last_contact = time.monotonic()
                    finished = self.step()
                    last_contact, attempt = time.monotonic(), 0
                    if finished is not None:
                        self.conclude(finished)
                        return finished
                except Overloaded as error:
                    # It answers, so patience does not run out. All who hear this were told different times.
                    last_contact = time.monotonic()
                    log.info("%s; coming back in %.1f s", error, error.retry_after_s)
                    time.sleep(error.retry_after_s)
                except Unavailable as error:
                    if time.monotonic() - last_contact > patience_s:
                        raise
                    attempt, joined = attempt + 1, False
                    first, most = self.timing.backoff_s
                    pause = random.uniform(0, min(most, first * 2**attempt))  # full jitter
                    log.warning("%s; trying again in %.1f s", error, pause)
                    time.sleep(pause)

    def conclude(self, finished: Finished) -> None:
        """Leave a run that is over, with the figures on its result that `ended` returns."""
        joined, score = self._joined, tuple[float, ...]()
        assert joined is not None  # there is an answer
        if self.ended is not None:
            schema = final_schema(self.policy, joined.schema, finished)
            decode = reader(finished.codec, schema, finished.bytes, "a final adapter")
            result = decode(self._fetch(finished.digest, finished.bytes))
            self._busy.set()
            with self._pace(joined).training():
                score = self.ended(result, finished.rounds)
        self._leave("run over", score)

    def _closed_s(self) -> float:
        return until_open_s(self.policy.compute.hours, dt.datetime.now())

    def _rest(self, closed_s: float, joined: bool) -> None:
        """Outside the site's hours: leave, so that nobody waits for this client, and sleep on."""
        if joined:
            log.info("outside compute.hours = %s; leaving for %.0f s", self.policy.compute.hours, closed_s)
            self._leave("outside its hours")
        time.sleep(min(closed_s, self.timing.rest_s))

    def _left_over(self, trainer: Training, run: str) -> OutboxEntry | None:
        """What an earlier process of this client finished and may not have sent to the end."""
        update = kept(self.outbox, run, self.name) if self.outbox is not None else None
        if update is None:
            return None
        try:
            trainer.release(update.charge, update.header.digest)
        except LedgerError as error:
            raise LedgerError(
                f"{error}: the update for round {update.header.round + 1} in {self.outbox} is not sent. Remove it "
                "if the ledger was replaced on purpose"
            ) from error
        reach("participant.left_over")
        log.info("round %d: sending again what was finished before", update.header.round + 1)
        return update

    def _answered(self, round: int) -> OutboxEntry | None:
        """The update that was made for this round before, if the coordinator did not take it then.

        A round that missed its quorum is opened again under its number, and is answered with the same bytes.
        """
        update = self._refused
        if update is None or update.header.round != round:
            self._refused, self._refusals = None, 0
            return None
        if self._refusals >= _MOST_REFUSALS:
            raise PolicyError(
                f"the coordinator asks for round {round + 1} again and has refused its update {self._refusals} times; "
                "no round is answered with two different updates"
            )
        return update

    def _work(self, assignment: Assignment) -> OutboxEntry:
        """The update for an assignment, or RoundCancelled, at a coarse time and with signs of life until then."""
        assert self._joined is not None  # step is only called after join
        self._busy.set()
        try:
            with self._pace(self._joined).training():
                return self._train(assignment)
        except Exception as error:
            self._give_up(assignment.round, error)
            raise
        finally:
            self._busy.clear()

    def _give_up(self, round: int, error: Exception) -> None:
        """Note what came of a round that has no update; after an error of this site tell the coordinator, too.

        An error that has been paid for would come again, and be paid for again, in whatever process comes after this
        one. A disk that was full is another matter: once it is freed the work can be done, at the price of once more.
        """
        assert self._trainer is not None  # there was an assignment
        ours = isinstance(error, OSError | LedgerError)
        why = OVER if isinstance(error, RoundCancelled) else None if ours else FAILED
        try:
            if not self._trainer.drop(why):
                return
        except LedgerError as trouble:
            log.error("round %d: what came of it is not in the ledger: %s", round + 1, trouble)
        if why == OVER:
            return
        again = "is not done again here" if why == FAILED else "may be charged and done again"
        log.error("round %d: failed after it was charged, and %s: %s", round + 1, again, error)
        if not isinstance(error, PolicyError | LedgerError):  # on which `step` leaves
            self._leave(REFUSED)

    @failpoint("participant.train")
    def _train(self, assignment: Assignment) -> OutboxEntry:
        """The update for an assignment, or RoundCancelled."""
        trainer, joined = self._trainer, self._joined
        assert trainer is not None  # step is only called after join
        assert joined is not None
        check_assignment(joined.spec, assignment)
        check_order(self.policy, joined.spec, joined.schema, assignment)
        if not joined.spec.secure_aggregation.enabled:
            codec(assignment.upload_codec)  # one that is unknown here is refused before anything is charged
        legs = self.held.legs(assignment, joined.schema)
        self._task = task = RoundContext(assignment.round)
        try:
            start = self.held.follow(assignment, legs, self._fetch)
            reach("participant.fetched")
            task.check_cancelled()  # a round that closed meanwhile is not even charged
            trained = trainer.train(joined.run, assignment, start, task.check_cancelled)
            task.check_cancelled()  # nothing is kept, noted or sent, whatever the training made of being told
            reach("participant.trained")
            update = packed(self.policy, joined, assignment, trained, self._left_out)
            digest = update.header.digest
            # First the bytes, then the word that they leave: what is released can always be sent again.
            if self.outbox is not None:
                keep(self.outbox, update)
            reach("participant.stored")
            trainer.release(trained.charge, digest)
            reach("participant.released")
        finally:
            self._task = None
        return update

    @failpoint("participant.deliver")
    def _deliver(self) -> None:
        """Send the pending update; it is forgotten once the coordinator has it or refuses it for good.

        Part of a secure sum, it may take several calls.
        """
        pending = self._pending
        assert pending is not None  # callers check
        try:
            if not self._insist(lambda: self._send(pending)):
                return
            reach("participant.delivered")
            self.rounds_trained += 1
            self._forget()
            self.delivered(pending.header.round + 1)
        except UpdateRejected as error:
            log.warning("round %d: update not taken: %s", pending.header.round + 1, error)
            self._forget()
        except ProtocolError as error:
            log.warning("round %d: update not taken: %s", pending.header.round + 1, error)
            self._refused, self._refusals = pending, self._refusals + 1
        self._pending = self._delivery = None

    def _send(self, pending: OutboxEntry) -> bool:
        """Whether the update is where it belongs. Nothing of one leaves but through here."""
        joined = self._joined
        assert joined is not None  # there is an update
        check_terms(pending, joined)
        if not joined.spec.secure_aggregation.enabled:
            self.connection.submit(pending.header, pending.payload)
            return True
        if self._delivery is None:
            member = membership(self.policy, joined.spec, pending.terms)
            self._delivery = Delivery(member, pending.header, pending.payload)
        self._busy.set()  # the masks of a large adapter take longer than a lease
        try:
            return self._delivery.advance(self.connection, joined)
        finally:
            self._busy.clear()

    def _forget(self) -> None:
        """Whatever waits in the outbox for this run is never asked for again."""
        self._refused, self._refusals = None, 0
        if self.outbox is not None and self._joined is not None:
            drop(self.outbox, self._joined.run, self.name)

    def _insist(self, call: Callable[[], Reply]) -> Reply:
        """Make a call; if it is refused, as by a coordinator that has restarted, join and make it once more."""
        try:
            return call()
        except ProtocolError as error:
            log.info("%s; joining again", error)
            self.join()
            return call()

    def _fetch(self, digest: str, size_bytes: int) -> bytes:
        return self._insist(lambda: self.connection.fetch(digest, size_bytes))

    def _leave(self, reason: str, score: tuple[float, ...] = ()) -> None:
        """Say so. A line that fails now must not hide why the client leaves; the lease runs out on its own."""
        with suppress(Unavailable, ProtocolError, IdentityError):
            self.connection.leave(reason, score)

    def _pace(self, joined: Joined) -> Pace:
        return self.pace if joined.spec.privacy.enabled else AT_ONCE

    @contextmanager
    def _leaving_on(self, *kinds: type[FedloomError]) -> Iterator[None]:
        """On an error of these kinds, tell the coordinator not to wait; the error goes on.

        The peer learns that this client refuses and not why: that may name files of this site, or say what is in them.
        """
        try:
            yield
        except kinds:
            self._leave(REFUSED)
            raise
