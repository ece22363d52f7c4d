"""The run as the disk knows it: the log folded into rounds, the strategy's state, and the step between two states.

Not safe for several threads; the coordinator holds its lock around every call.
"""

import hashlib
import logging
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedloom.proto.codec import codec
from fedloom.proto.errors import ConfigError, StoreError
from fedloom.proto.failpoints import failpoint, reach
from fedloom.proto.run import RunConfig
from fedloom.proto.schema import Schema, Tensors
from fedloom.server.broadcast import Broadcasts
from fedloom.server.rounds import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    RoundOpened,
    Rounds,
    RunCreated,
    apply,
    decision,
)
from fedloom.server.store import Store
from fedloom.server.user_ledger import check_opening, check_strategy, eligible, participations
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.state import state_from_bytes, state_to_bytes

__all__ = ["SUM", "SUM_CODEC", "History"]

SUM = "sum of all"
"""Stands for the client in the one update of a secure sum; no client's name has spaces."""

SUM_CODEC = "fp32"
"""Codec in which the mean of a secure sum is stored."""

_FRESH_BYTES = 256 << 20
"""Decoded updates kept in memory between their arrival and the fold, which spares reading and hashing them again."""

_log = logging.getLogger(__name__)


class History:
    """One run on one state directory: begun, or taken up where the log ends.

    Args:
        config: The run file.
        schema: The run's schema.
        strategy: Plans and folds.
        store: The state directory, open.
        starting: The adapter before the first round; not looked at when the run goes on.

    Attributes:
        rounds: Where the run stands.
        state: The strategy's state after the last commit.
        broadcasts: What clients of the current round are asked to do.
        expected: Who took part last when the directory was opened, and will come back.

    Raises:
        ConfigError: The directory holds another run, or the strategy is not what [user_level] promises.
        StoreError: The state cannot be read or written.
    """

    def __init__(
        self, config: RunConfig, schema: Schema, strategy: Strategy, store: Store, *, starting: Tensors
    ) -> None:
        check_strategy(config.user_level, strategy)
        self._config, self._schema, self._strategy, self._store = config, schema, strategy, store
        self._unwritten: list[Event] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        self._fresh: dict[str, Update] = {}
        self._broken: StoreError | None = None
        self.state: State
        self.rounds = Rounds()
        events = store.events()
        for event in events:
            self.rounds = apply(self.rounds, event)
        cohorts = [event.cohort for event in events if isinstance(event, RoundOpened)]
        self.expected = frozenset(cohorts[-1] if cohorts else ()) - self.rounds.lost.keys()
        self._taken = participations(events)
        self.run = self._begin(starting) if self.rounds.created is None else self._continue(self.rounds.created)
        self.broadcasts = Broadcasts(config, schema, strategy, self.state)
        self._sweep()

    def check(self) -> None:
        """Refuse to go on after a failure of the disk: memory may then be ahead of it.

        Raises:
            StoreError: What the disk said.
        """
        if self._broken is not None:
            raise self._broken

    def record(self, event: Event) -> None:
        """Take an event in; it counts for nobody outside before `write`.

        Raises:
            BudgetError: It opens a round that the user-level budget does not cover.
        """
        if isinstance(event, RoundOpened):
            check_opening(self._config.user_level, self.rounds.round)
        self.rounds = apply(self.rounds, event)
        self._taken += participations([event])
        self._unwritten.append(event)
        _log.log(logging.WARNING if isinstance(event, ClientLost) else logging.INFO, "%s", event)

    def due(self, live: Collection[str], elapsed_s: float, expect: int) -> RoundClosed | RoundOpened | None:
        """The next decision that is due, among the clients that may still be asked; see `rounds.decision`."""
        askable = eligible(self._config.user_level, self._taken, live)
        return decision(self.rounds, askable, self._config, elapsed_s, expect)

    def keep(self, update: Update) -> None:
        """Remember an accepted update's values until the round is folded, if there is room; the disk has them too."""
        room = _FRESH_BYTES // (4 * self._schema.size)
        if len(self._fresh) < room:
            self._fresh[update.client] = update

    @failpoint("history.write")
    def write(self) -> None:
        """Make what was recorded durable.

        Raises:
            StoreError: The disk refuses; `check` repeats it from now on.
        """
        events, self._unwritten = self._unwritten, []
        if not events:
            return
        try:
            self._store.append(*events)
            if any(isinstance(event, AdapterCommitted) for event in events):
                self._sweep()
        except StoreError as error:
            self._broken = error
            raise

    @failpoint("history.commit")
    def commit(self) -> State:
        """Fold the closed round's updates in their order; record the result and make it the state.

        Raises:
            StoreError: An update or the new state cannot be read or written, or the new state is not finite.
        """
        acc: Any = None
        for client in (SUM,) if self.rounds.sum else self.rounds.folding:
            update = self._fresh[client] if client in self._fresh else self._reread(client)
            acc = self._strategy.fold(self.state, acc, update)
        self._fresh.clear()
        reach("history.folded")
        state = self._strategy.commit(self.state, acc)
        self._schema.check(state.adapter)
        spoilt = [name for name, tensor in state.adapter.items() if not np.isfinite(tensor).all()]
        if spoilt or state.round != self.rounds.round + 1:
            self._broken = StoreError(
                f"round {self.rounds.round} would give NaN or Inf in {spoilt[:3]} (state of round {state.round}); "
                "nothing is committed, look at the strategy's options and at who took part"
            )
            raise self._broken
        reach("history.stepped")
        # Who took part will ask again at once: its broadcast is encoded while the disk takes the state.
        writing = self._writer.submit(self._store.put_blob, state_to_bytes(state))
        broadcasts = Broadcasts(self._config, self._schema, self._strategy, state)
        try:
            if state.round < self._config.run.rounds:
                broadcasts.prepare(self.rounds.folding)
        finally:
            digest = writing.result()
        reach("history.stored")
        self.record(AdapterCommitted(self.rounds.round, digest))
        reach("history.committed")
        self.state, self.broadcasts = state, broadcasts
        return state

    @failpoint("history.reread")
    def _reread(self, client: str) -> Update:
        """An accepted update, or the mean of them all, from its blob."""
        accepted = self.rounds.updates[self.rounds.folding[0] if client == SUM else client]
        order = self.broadcasts.order(accepted.client)
        payload = self._store.get_blob(accepted.digest)
        delta = codec(SUM_CODEC if client == SUM else order.assignment.upload_codec).decode(order.upload, payload)
        return Update(client, accepted.weight, self.broadcasts.start(order), delta)

    @failpoint("history.begin")
    def _begin(self, starting: Tensors) -> str:
        self.state = self._strategy.init(self._schema, starting, self._config.run.seed)
        digest = self._store.put_blob(state_to_bytes(self.state))
        reach("history.born")
        created = RunCreated(uuid.uuid4().hex, _agreed(self._config), self._schema.digest, digest)
        self.record(created)
        self.write()
        return created.run

    @failpoint("history.continue")
    def _continue(self, created: RunCreated) -> str:
        if (created.spec, created.schema) != (_agreed(self._config), self._schema.digest):
            raise ConfigError(
                f"{self._store.folder} holds run {created.run[:8]} of another run file or base model; "
                "start with the run file it was made with, or give this run another directory"
            )
        self.state = state_from_bytes(self._store.get_blob(self.rounds.state), self._schema)
        _log.info("run %s goes on at round %d, epoch %d", created.run[:8], self.rounds.round, self._store.epoch)
        return created.run

    def _sweep(self) -> None:
        """Drop the updates of committed rounds and the states before the current one."""
        self._store.sweep({self.rounds.state, *(update.digest for update in self.rounds.updates.values())})


def _agreed(config: RunConfig) -> str:
    """Digest of what a run may not change on the way: all that clients were told, and the strategy."""
    text = config.spec.model_dump_json() + config.strategy.model_dump_json() + config.user_level.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()
