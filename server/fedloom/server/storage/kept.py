"""The committed rounds that a state directory has kept, see rounds.keep. Nothing is changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig, TrainSection
from fedloom.core.errors import ConfigError
from fedloom.core.schema import Schema
from fedloom.proto.checks import overridden
from fedloom.server.build import build_strategy
from fedloom.server.rounds.broadcast import Broadcasts
from fedloom.server.rounds.run_log import may_be
from fedloom.server.rounds.state import AdapterCommitted, Rounds, UpdateAccepted, apply
from fedloom.server.storage.verify import look, read_blob
from fedloom.strategies.api import State, Strategy, Update
from fedloom.strategies.state import state_from_bytes

__all__ = ["KeptRound", "kept_rounds"]


@dataclass(frozen=True)
class KeptRound:
    """One committed round."""

    number: int
    """Counted from 1."""
    before: State
    after: State
    updates: tuple[Update, ...]
    """In the order in which they were folded; empty where only their sum was ever seen."""
    trained: tuple[TrainSection, ...]
    """[train] as each of these clients had it."""
    strategy: Strategy
    """Of the run; it says what the model of a state is."""


def kept_rounds(folder: Path, config: RunConfig) -> Iterator[KeptRound]:
    """The rounds that are still there, oldest first, also while a coordinator works on the directory.

    Args:
        folder: The state directory.
        config: The run file that the run left, with everything filled in.

    Raises:
        ConfigError: The directory holds another run, or its strategy is not installed.
        StoreError: It is none, or what it holds is not what was written.
    """
    snapshot = look(folder)
    created = snapshot.rounds.created
    if created is None or not (folder / "blobs" / created.schema).is_file():
        return
    if not may_be(config, created.spec):
        raise ConfigError(
            f"{folder} holds run {created.run[:8]} of another run file; give the run folder as the run left it"
        )
    schema = Schema.from_json(read_blob(folder / "blobs" / created.schema).decode())
    reading = _Reading(folder / "blobs", config, schema, build_strategy(config), {0: created.state})
    rounds = Rounds()
    for event in snapshot.events:
        closed, rounds = rounds, apply(rounds, event)
        if isinstance(event, AdapterCommitted):
            reading.states[rounds.round] = event.state
            try:
                kept = reading.round(closed)
            except FileNotFoundError:
                continue  # older than what is kept, or swept just now
            yield kept


@dataclass(frozen=True)
class _Reading:
    """A state directory that is read from its first round on."""

    blobs: Path
    config: RunConfig
    schema: Schema
    strategy: Strategy
    states: dict[int, str]
    """Digest of the state before the round with this number."""

    def round(self, closed: Rounds) -> KeptRound:
        """A closed round, whose successor's state is known.

        Raises:
            FileNotFoundError: Something of it is gone.
        """
        before, after = (self._state(number) for number in (closed.round, closed.round + 1))
        accepted = [] if closed.sum else [closed.updates[client] for client in closed.folding]
        versions = {number: self._version(number) for number in {each.round for each in accepted}}
        updates = [self._update(each, versions[each.round], closed.round) for each in accepted]
        trained = [
            overridden(self.config.train, versions[each.round].assignment(each.client).local) for each in accepted
        ]
        return KeptRound(closed.round + 1, before, after, tuple(updates), tuple(trained), self.strategy)

    def _state(self, number: int) -> State:
        return state_from_bytes(read_blob(self.blobs / self.states[number]), self.schema)

    def _version(self, number: int) -> Broadcasts:
        return Broadcasts(self.config, self.schema, self.strategy, self._state(number))

    def _update(self, accepted: UpdateAccepted, version: Broadcasts, round: int) -> Update:
        client, payload = accepted.client, read_blob(self.blobs / accepted.digest)
        delta = codec(version.assignment(client).upload_codec).decode(version.upload_schema(client), payload)
        return Update(client, accepted.weight, version.start(client), delta, staleness=round - accepted.round)
