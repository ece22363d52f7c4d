"""The run as the disk knows it: the log folded into rounds, the strategy's state, and the step between two states.

Not safe for several threads but for `next_state`; the coordinator holds its lock around every other call.
"""

import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import numpy as np

from fedloom.core.codecs.auto import chosen, possible
from fedloom.core.config.run import RunConfig, WireSection
from fedloom.core.errors import ConfigError, SchemaError, StoreError, StrategyError
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.core.schema import Schema, Tensors
from fedloom.proto.messages import Assignment, Finished, RoundStatus, UpdateHeader
from fedloom.server.privacy.user_ledger import check_opening, check_strategy, eligible, participations
from fedloom.server.rounds.aggregation import Aggregation, NextState
from fedloom.server.rounds.broadcast import Broadcasts, final
from fedloom.server.rounds.evaluation import client_metrics
from fedloom.server.rounds.scheduling import asking, decision
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientLost,
    Event,
    RoundClosed,
    RoundOpened,
    Rounds,
    RunCreated,
    UpdateAccepted,
    apply,
    told,
)
from fedloom.server.rounds.update_norm import largest_norm, noise_std
from fedloom.server.rounds.validation import check_address, check_score, expected_bytes, is_repeat
from fedloom.server.storage.api import Storage
from fedloom.server.strategy_errors import blamed
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.result import result_schema
from fedloom.strategies.state import state_from_bytes, state_to_bytes
from fedloom.strategies.transforms.user_level_dp import check_memory

__all__ = ["History", "agreed", "may_be"]

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
        fault: What the strategy has failed with in the open round.
        returning: Who took part last when the directory was opened, and will come back.

    Raises:
        ConfigError: The directory holds another run, or the strategy is not what [user_level] promises.
        StoreError: The state cannot be read or written.
    """

    def __init__(
        self, config: RunConfig, schema: Schema, strategy: Strategy, store: Storage, *, starting: Tensors
    ) -> None:
        check_strategy(config.user_level, strategy)
        self._config, self._schema, self._strategy, self._store = config, schema, strategy, store
        self._unwritten: list[Event] = []
        self._aggregation = Aggregation(config, schema, strategy, store)
        self._states: dict[int, str] = {}
        self._older: dict[int, Broadcasts] = {}
        self._arriving: Counter[str] = Counter()
        self._kept: dict[int, tuple[UpdateAccepted, ...]] = {}
        self._askable: tuple[tuple[int, int], Collection[str]] = (-1, -1), ()
        self._broken: StoreError | StrategyError | None = None
        self._failed: set[str] = set()
        self.fault: StrategyError | None = None
        self._ending: tuple[Finished, bytes] | None = None
        self.state: State
        self.rounds = Rounds()
        events = store.events()
        for event in events:
            self._follow(event)
        cohorts = [event.cohort for event in events if isinstance(event, RoundOpened)]
        self.returning = (frozenset(cohorts[-1] if cohorts else ()) | self.rounds.cohort) - self.rounds.lost.keys()
        self._taken = participations(events)
        self.run = self._begin(starting) if self.rounds.created is None else self._continue(self.rounds.created)
        if config.user_level.enabled:
            check_memory(self.state)
        self.broadcasts = Broadcasts(config, schema, strategy, self.state)
        if config.rounds.keep:
            store.put_blob(schema.to_json().encode(), schema.digest)  # what is kept can be read without the base model
        self._sweep()

    @property
    def final(self) -> tuple[Finished, bytes]:
        """The end of the run and the final adapter's bytes, encoded at the first call."""
        if self._ending is None:
            self._ending = final(self._schema, self.state.round, self.result(self.state))
        return self._ending

    def result(self, state: State) -> Tensors:
        """The model of a state of this run, see `Strategy.result`.

        Raises:
            StrategyError: The strategy gives none that fits the run's schema, or one that is not finite.
        """
        with blamed(self._config.strategy.name, f"result of round {state.round}"):
            model = self._strategy.result(state)
            result_schema(self._schema, model)
        return model

    @property
    def finished(self) -> bool:
        """Whether no more rounds come."""
        return self.rounds.over(self._config.run.rounds)

    @property
    def standing(self) -> RoundStatus:
        """What a client that trains is told."""
        return RoundStatus(self.rounds.next, self.rounds.phase == "open", self.rounds.oldest)

    def check(self) -> None:
        """Refuse to go on after a failure of the disk, where memory may be ahead of it, or of the strategy.

        Raises:
            StoreError: What the disk said.
            StrategyError: What the strategy said.
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
        self._follow(event)
        self._taken.update(participations([event]))
        self._unwritten.append(event)
        _log.log(logging.WARNING if isinstance(event, ClientLost) else logging.INFO, "%s", told(event))

    def due(
        self, live: Collection[str], changes: int, elapsed_s: float, expect: int
    ) -> RoundClosed | RoundOpened | None:
        """The next decision that is due, among the clients that may still be asked; see `scheduling.decision`.

        Args:
            live: Clients that have asked for work and whose lease has not lapsed.
            changes: Another number whenever they are others.
            elapsed_s: Seconds since the round was opened.
            expect: Clients that must be live before the very first round opens, if more than the minimum.
        """
        seen = changes, self.rounds.round
        if self._askable[0] != seen:
            self._askable = seen, eligible(self._config.user_level, self._taken, live)
        return decision(self.rounds, self._askable[1], self._config, elapsed_s, expect)

    def draft(self, header: UpdateHeader, declared_examples: int) -> tuple[Assignment, Schema, Update, float]:
        """What a client was asked to do, the schema of its update, the update but for the change, and its bound."""
        client, broadcasts = header.client, self._asked_in(header.client)
        asked, upload = broadcasts.assignment(client), broadcasts.upload_schema(client)
        weight = float(declared_examples) if self._config.strategy.weighting == "examples" else 1.0
        noise = 0.0
        if self._strategy.traits.reads_noise:
            noise = noise_std(self._config, header.round, asked.local, declared_examples)
        told = broadcasts.update(client, weight, {}, client_metrics(self._config, header.score))
        update = replace(told, noise_std=noise)
        limit = self._config.rounds.max_update_norm or largest_norm(
            self._config, asked.local, upload.size, declared_examples, update.linear
        )
        return asked, upload, update, limit

    @contextmanager
    def arriving(self, digest: str) -> Iterator[None]:
        """Until the block ends, the blob of an update that is not recorded yet is not swept."""
        self._arriving[digest] += 1
        try:
            yield
        finally:
            self._arriving[digest] -= 1
            if not self._arriving[digest]:
                del self._arriving[digest]

    def payload(self, client: str, digest: str) -> bytes | None:
        """The bytes this client may have under this digest: its broadcast, or the final adapter; else None."""
        if self.finished:
            ending, payload = self.final
            return payload if digest == ending.digest else None
        if self.rounds.phase != "open" or client not in self.rounds.cohort:
            return None
        return self._asked_in(client).payload(client, digest)

    def expected(self, header: UpdateHeader) -> int | None:
        """The exact length in bytes of the payload that must follow; None when exactly this update is accepted already.

        Raises:
            ProtocolError: The update fits neither the log nor the open round.
            UpdateRejected: This client's update was refused in this round before.
        """
        accepted = self.rounds.updates.get(header.client)
        if header.round != self.rounds.round:
            accepted = self._store.accepted(header.round, header.client)
        if is_repeat(header, accepted):
            return None
        check_address(header, self.rounds)
        check_score(header, self._config)
        broadcasts = self._asked_in(header.client)
        upload, integers = broadcasts.upload_schema(header.client), self._config.secure_aggregation.integers
        masked_bytes = np.dtype(integers.word).itemsize * integers.size(upload)
        return expected_bytes(header, broadcasts.assignment(header.client).upload_codec, upload, masked_bytes)

    def assign(self, client: str, held: str) -> Assignment | None:
        """What a client that asks for work is to do; in a buffered round, the decision that it is asked is recorded.

        Args:
            client: Who asks.
            held: Digest of the adapter that it has; "" for none.

        Raises:
            ConfigError: The strategy plans what the run file rules out.
        """
        if event := asking(self.rounds, client, self._config.rounds):
            self.record(event)
        asked = self.rounds.takes_from(client) and self.rounds.started(client) == self.rounds.round
        return self._asked_in(client).asked(client, held) if asked else None

    def failing(self, client: str, error: StrategyError | ConfigError) -> None:
        """Note that the strategy fails for a client of the open round.

        Raises:
            StrategyError: It has failed for as many as a round needs and worked for nobody: `check` repeats it.
        """
        self.fault = error if isinstance(error, StrategyError) else StrategyError(str(error))
        self._failed.add(client)
        if not self.rounds.updates and len(self._failed) >= self._config.rounds.min_clients:
            self._broken = self.fault
            raise self.fault

    def keep(self, update: Update) -> None:
        """Remember an accepted update's values until the round is folded, if there is room."""
        self._aggregation.keep(update)

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
    def next_state(self) -> NextState:
        """What the closed round gives, stored and not recorded. It needs no lock, but only one thread may call it.

        While a round is closed nothing is recorded but its commit, so what this looks at stays as it is.

        Raises:
            StoreError: See `Aggregation.next_state`.
            StrategyError: Likewise.
        """
        try:
            return self._aggregation.next_state(self.rounds, self.state, self._version)
        except (StoreError, StrategyError) as error:
            self._broken = error
            raise

    def commit(self, after: NextState) -> None:
        """Record what the closed round gives and make it the state."""
        if self.rounds.starts:
            self._older[self.rounds.round] = self.broadcasts
        self.record(AdapterCommitted(self.rounds.round, after.digest))
        reach("history.committed")
        self.state, self.broadcasts = after.state, after.broadcasts

    def _asked_in(self, client: str) -> Broadcasts:
        """The broadcasts of the round in which this client was asked."""
        return self._version(self.rounds.started(client))

    def _version(self, number: int) -> Broadcasts:
        """The broadcasts of the round that is open, or of an earlier one that clients are still at work for."""
        if number == self.rounds.round:
            return self.broadcasts
        if number not in self._older:
            state = state_from_bytes(self._store.get_blob(self._states[number]), self._schema)
            self._older[number] = Broadcasts(self._config, self._schema, self._strategy, state)
        return self._older[number]

    def _follow(self, event: Event) -> None:
        before, self.rounds = self.rounds, apply(self.rounds, event)
        if isinstance(event, AdapterCommitted):
            self._kept[before.round] = tuple(before.updates[client] for client in before.folding)
            self._kept.pop(before.round - self._config.rounds.keep, None)
        if isinstance(event, RunCreated | AdapterCommitted):
            self._states[self.rounds.round] = event.state
            self._failed, self.fault = set(), None

    @failpoint("history.begin")
    def _begin(self, starting: Tensors) -> str:
        with blamed(self._config.strategy.name, "init", ConfigError, SchemaError):
            self.state = self._strategy.init(self._schema, starting, self._config.run.seed)
        self.result(self.state)
        digest = self._store.put_blob(state_to_bytes(self.state))
        reach("history.born")
        created = RunCreated(uuid.uuid4().hex, agreed(self._config, self._schema), self._schema.digest, digest)
        self.record(created)
        self.write()
        return created.run

    @failpoint("history.continue")
    def _continue(self, created: RunCreated) -> str:
        specs = [agreed(each, self._schema) for each in _readings(self._config)]
        if created.spec not in specs or created.schema != self._schema.digest:
            raise ConfigError(
                f"{self._store.where} holds run {created.run[:8]} of another run file or base model; give its own (of "
                "0.1: strategy.weighting = 'uniform', wire.upload and wire.broadcast = 'fp32') or another directory; "
                "start.adapter is for more rounds"
            )
        self.state = state_from_bytes(self._store.get_blob(self.rounds.state), self._schema)
        _log.info("run %s goes on at round %d, epoch %d", created.run[:8], self.rounds.round + 1, self._store.epoch)
        return created.run

    def _sweep(self) -> None:
        """Drop what nobody is at work from any more: updates and states of committed rounds that are not to be kept."""
        used = {self.rounds.round, *self.rounds.starts.values()}
        self._older = {number: older for number, older in self._older.items() if number in used}
        kept = [update for updates in self._kept.values() for update in updates]
        used |= {*self._kept, *(update.round for update in kept)}
        self._states = {number: digest for number, digest in self._states.items() if number in used}
        updates = (update.digest for update in (*self.rounds.updates.values(), *kept))
        self._store.sweep({*self._states.values(), *updates, *tuple(self._arriving), self._schema.digest})


def agreed(config: RunConfig, schema: Schema) -> str:
    """Digest of what a run may not change on the way: all that clients were told, and the strategy."""
    wire = config.wire
    return _digest(config, WireSection(upload=chosen(wire.upload, schema), broadcast=chosen(wire.broadcast, schema)))


def may_be(config: RunConfig, spec: str) -> bool:
    """Whether this is what was `agreed` for some schema."""
    wires = product(_readings(config), possible(config.wire.upload), possible(config.wire.broadcast))
    return any(spec == _digest(each, WireSection(upload=up, broadcast=down)) for each, up, down in wires)


def _readings(config: RunConfig) -> Iterator[RunConfig]:
    """The run file, and as builds read it to which targets that are left open were queries and values.

    Which layers these are is the schema's to say, and that is compared too.
    """
    yield config
    if config.adapter.targets == "auto":
        adapter = config.adapter.model_copy(update={"targets": ("query", "value")})
        yield config.model_copy(update={"adapter": adapter})


def _digest(config: RunConfig, wire: WireSection) -> str:
    # Absent rather than null, and uniform where weights are left open: runs from before either keep their digest. So do
    # small ones that name no codec, which was fp32.
    weighting = "uniform" if config.strategy.weighting == "auto" else config.strategy.weighting
    strategy = config.strategy.model_copy(update={"weighting": weighting}).model_dump_json(exclude_none=True)
    spec = config.spec.model_copy(update={"wire": wire}).model_dump_json()
    text = spec + strategy + config.user_level.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()
