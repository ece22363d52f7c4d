"""Secure sums in the life of a run: when a step's time is up, and what a sum becomes.

Not safe for several threads but for `Secure.unmask`; the coordinator holds its lock around every other call.
"""

import logging

from fedloom.core.codecs import codec
from fedloom.core.codecs.api import seed_of
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ProtocolError
from fedloom.core.secagg.keys import Place
from fedloom.core.secagg.steps import Step
from fedloom.proto.messages import StepMessage, StepResult, UpdateHeader
from fedloom.server.rounds.aggregation import SUM_CODEC
from fedloom.server.rounds.run_log import History
from fedloom.server.rounds.state import SumAccepted
from fedloom.server.secagg.protocol import Exchange, Unmasking, unmasked
from fedloom.server.storage.api import Storage

__all__ = ["Secure"]

_log = logging.getLogger(__name__)


class Secure:
    """The secure sum of whichever round is open.

    Args:
        config: The run file, already checked.
        history: The run; its rounds and broadcasts are read, and the sum is recorded there.
        store: Its state directory.

    Attributes:
        enabled: Whether this run has secure sums; otherwise no message is taken, and nothing is ever due.
    """

    def __init__(self, config: RunConfig, history: History, store: Storage) -> None:
        self._section, self._min_clients = config.secure_aggregation, config.rounds.min_clients
        self._seed = config.run.seed
        self.enabled = self._section.enabled
        self._history, self._store = history, store
        self._exchange: Exchange | None = None
        self._claimed = False
        self._since_s = 0.0
        self._last: frozenset[tuple[int, str]] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether clients may still be asked to train for the round, and the round opened again with others."""
        return self._exchange is None or self._exchange.step is Step.ADVERTISE

    def take(self, client: str, message: StepMessage) -> StepResult | None:
        """A client's message in a step; the step's result once it is closed, else None.

        Raises:
            ProtocolError: It fits neither the open round nor its sum.
        """
        if message.step is Step.UNMASK and (message.round, client) in self._last:
            return StepResult(message.attempt, {})  # it is in, and has done its part
        return self._of(client, message.round).take(client, message)

    def add(self, header: UpdateHeader, payload: bytes) -> bool:
        """Add a masked update; True when exactly it was there before.

        Raises:
            ProtocolError: It fits neither the open round nor its sum.
        """
        return self._of(header.client, header.round).add(header.client, header.attempt, payload)

    def advance(self, elapsed_s: float) -> bool:
        """Close what is due; whether a waiting client may have an answer.

        Args:
            elapsed_s: Seconds since the round was opened.
        """
        exchange, rounds = self._exchange, self._history.rounds
        if exchange is None:
            return False
        limit_s = rounds.deadline_s if self.idle else self._since_s + self._section.step_deadline_s
        if not exchange.advance(rounds.cohort - rounds.lost.keys(), elapsed_s >= limit_s):
            return False
        self._since_s = elapsed_s
        return True

    def claim(self) -> Unmasking | None:
        """What is to be unmasked, for the first caller after the last step; then nothing until `settle`."""
        given = None if self._exchange is None or self._claimed else self._exchange.unmasking()
        self._claimed = self._claimed or given is not None
        return given

    def unmask(self, given: Unmasking) -> SumAccepted | None:
        """The sum as an event, its blob durable; None when the shares do not unmask it. Needs no lock.

        Raises:
            StoreError: The disk refuses.
        """
        try:
            total = unmasked(given)
        except ProtocolError as error:
            _log.error("round %d: %s; the secure sum begins anew", given.place.round + 1, error)
            return None
        upload = self._history.broadcasts.upload_schema(given.survivors[0])
        place = self._seed, given.place.round
        owns = [seed_of(*place, name) for name in given.survivors]
        mean = self._section.integers.mean(upload, total, seed_of(*place), owns)
        digest = self._store.put_blob(codec(SUM_CODEC).encode(upload, mean))
        return SumAccepted(given.place.round, given.survivors, digest)

    def settle(self, given: Unmasking, event: SumAccepted | None) -> None:
        """The end of what was claimed: the sum is in, or begins anew."""
        self._claimed = False
        if event is not None:
            self._history.record(event)
            self._last = frozenset((given.place.round, name) for name in given.survivors)
            self._exchange = None
        elif self._exchange is not None:
            self._exchange.restart()

    def _of(self, client: str, number: int) -> Exchange:
        """The sum of the open round, begun if need be."""
        rounds = self._history.rounds
        if not self.enabled:
            raise ProtocolError("this run has no secure sums; join again and hand the update in openly")
        if rounds.phase != "open" or number != rounds.round or rounds.updates:
            raise ProtocolError(
                f"client {client!r} is at the secure sum of round {number + 1}, which is over or not open; drop "
                "the update and ask for work"
            )
        if client not in rounds.cohort:
            raise ProtocolError(f"client {client!r} was not asked to train in round {number + 1}; ask for work")
        if self._exchange is None:
            place = Place(self._history.run, self._store.epoch, number)
            values = self._section.integers.size(self._history.broadcasts.upload_schema(client))
            self._exchange = Exchange(place, self._section, self._min_clients, values)
        return self._exchange
