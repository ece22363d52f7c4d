"""From a closed round's updates to the next state: folded, committed by the strategy, and stored."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import StoreError
from fedloom.core.runtime.failpoints import failpoint, reach
from fedloom.core.schema import Schema
from fedloom.server.rounds.broadcast import Broadcasts
from fedloom.server.rounds.evaluation import client_metrics
from fedloom.server.rounds.state import Rounds
from fedloom.server.storage.api import Storage
from fedloom.server.strategy_errors import blamed
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.result import result_schema, voided
from fedloom.strategies.state import state_to_bytes

__all__ = ["SUM", "SUM_CODEC", "Aggregation", "NextState"]

SUM = "sum of all"
"""Stands for the client in the one update of a secure sum; no client's name has spaces."""

SUM_CODEC = "fp32"
"""Codec in which the mean of a secure sum is stored."""

_FRESH_BYTES = 32 << 20
"""Decoded updates kept in memory until the fold; the others are read back one by one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NextState:
    """What a round gives: durable, and not in the log yet."""

    state: State
    digest: str
    """Of its blob."""
    broadcasts: Broadcasts


class Aggregation:
    """Makes the next state of a round, on as much memory as a few updates take.

    Args:
        config: The run file.
        schema: The run's schema.
        strategy: Folds and commits.
        store: Has the updates and takes the state.
    """

    def __init__(self, config: RunConfig, schema: Schema, strategy: Strategy, store: Storage) -> None:
        self._config, self._schema, self._strategy, self._store = config, schema, strategy, store
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="aggregation")
        self._fresh: dict[str, Update] = {}

    def keep(self, update: Update) -> None:
        """Remember an accepted update's values until the round is folded, if there is room; the disk has them too."""
        room = _FRESH_BYTES // (4 * self._schema.size)
        if len(self._fresh) < room:
            self._fresh[update.client] = update

    def next_state(self, rounds: Rounds, state: State, version: Callable[[int], Broadcasts]) -> NextState:
        """Fold the closed round's updates in their order, let the strategy commit, and store what it gives.

        Args:
            rounds: Where the run stands; its round is closed.
            state: The strategy's state at the round's start.
            version: The broadcasts of the round with this number, which clients started from.

        Raises:
            StoreError: An update or the new state cannot be read or written, or the new state is not finite.
            StrategyError: The strategy fails; the round stays closed with its updates, for a corrected one.
        """
        acc: Any = None
        name, number = self._config.strategy.name, rounds.round + 1
        for client, update in self._updates(rounds, version):
            staleness = 0 if rounds.sum else rounds.round - rounds.updates[client].round
            with blamed(name, f"fold of round {number}, at client {client!r}"):
                acc = self._strategy.fold(state, acc, replace(update, staleness=staleness))
        self._fresh.clear()
        reach("history.folded")
        with blamed(name, f"commit of round {number}"):
            after = self._strategy.commit(state, acc)
            self._schema.check(after.adapter)
        spoilt = [name for name, tensor in after.adapter.items() if not np.isfinite(tensor).all()]
        if spoilt or after.round != number:
            raise StoreError(
                f"round {number} would give NaN or Inf in {spoilt[:3]} (state of round {after.round}); nothing is "
                "committed, look at the strategy's options and at who took part"
            )
        with blamed(name, f"result of round {after.round}"):
            result_schema(self._schema, self._strategy.result(after))
        reach("history.stepped")
        stored = self._stored(rounds, state, after)
        reach("history.stored")
        return stored

    def _stored(self, rounds: Rounds, before: State, after: State) -> NextState:
        """The next state with its broadcasts and the digest of its blob; one whose adapter can be sent to clients.

        An update that leads to any other by itself was refused (`validation.decoded`); several may do it together,
        where a strategy rewrites its factors. The round is then void and the adapter stays, since a run whose adapter
        no client can have is lost.

        Raises:
            StoreError: The disk refuses, or what the strategy remembers cannot be sent either.
        """
        for candidate in (after, voided(after, before)):
            # Who took part will ask again at once: its broadcast is encoded while the disk takes the state.
            writing = self._worker.submit(self._store.put_blob, state_to_bytes(candidate))
            broadcasts = Broadcasts(self._config, self._schema, self._strategy, candidate)
            last = candidate.round >= self._config.run.rounds
            try:
                unsendable = None if last else broadcasts.prepare(rounds.folding)
            finally:
                digest = writing.result()
            if unsendable is None:
                return NextState(candidate, digest, broadcasts)
            _log.error("round %d is void, the adapter stays as it was: %s", rounds.round + 1, unsendable)
        raise StoreError(
            f"round {rounds.round + 1} would give a broadcast that wire.broadcast = "
            f'"{self._config.wire.broadcast}" cannot carry; nothing is committed, begin a run with "fp32"'
        )

    def _updates(self, rounds: Rounds, version: Callable[[int], Broadcasts]) -> Iterator[tuple[str, Update]]:
        """The round's updates in their order. One that must be read back is read while the one before is folded."""

        def coming(client: str | None) -> Callable[[], Update]:
            if client is None or client in self._fresh:
                return lambda: self._fresh[client or ""]
            return self._worker.submit(self._reread, client, rounds, version).result

        clients = (SUM,) if rounds.sum else rounds.folding
        update = coming(clients[0])
        for client, following in pairwise((*clients, None)):
            found, update = update(), coming(following)
            assert client is not None  # only the last of a pair is
            yield client, found

    @failpoint("history.reread")
    def _reread(self, client: str, rounds: Rounds, version: Callable[[int], Broadcasts]) -> Update:
        """An accepted update, or the mean of them all, from its blob."""
        accepted = rounds.updates[rounds.folding[0] if client == SUM else client]
        broadcasts = version(accepted.round)
        payload = self._store.get_blob(accepted.digest)
        name = SUM_CODEC if client == SUM else broadcasts.assignment(accepted.client).upload_codec
        delta = codec(name).decode(broadcasts.upload_schema(accepted.client), payload)
        # As in `History.draft`, whose update is folded if this process has accepted it itself.
        metrics = client_metrics(self._config, accepted.score)
        update = broadcasts.update(accepted.client, accepted.weight, delta, metrics)
        return replace(update, client=client, noise_std=accepted.noise_std)
