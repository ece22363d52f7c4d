"""Exactly once, as a game: messages are repeated, reordered, delayed and cut off by crashes, against a small model.

Whatever happens, an update that was acknowledged is in the log, no update is in it twice, another one for the same
round and client never takes its place, and each committed adapter is the mean of exactly the updates that the log
names for its round.

`FEDLOOM_PROVE=1` plays 100,000 steps.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedloom.core.codecs import codec
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ProtocolError, StoreError, UpdateRejected
from fedloom.core.schema import Role, Schema, TensorSpec
from fedloom.proto.messages import Assignment, UpdateHeader, upload_schema
from fedloom.server.coordinator import Coordinator
from fedloom.server.rounds.state import AdapterCommitted, Event, RoundClosed, UpdateAccepted
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter

PROVE = os.environ.get("FEDLOOM_PROVE") == "1"
NAMES = ("ann", "ben", "cat")
SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 2)), TensorSpec("m.B", "m", Role.LORA_B, (2, 1))))
START = starting_adapter(SCHEMA, 0)
CONFIG = RunConfig.model_validate(
    {
        "run": {"name": "game", "rounds": 100_000},
        "model": {"base": "tiny", "labels": ["no", "yes"], "head": "frozen"},
        "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
        "rounds": {"min_clients": 2, "deadline_s": 60.0, "lease_s": 20.0},
    }
)


class Dying(Store):
    """A store that fails once when told to: before the write, or after it, which the caller cannot tell apart."""

    fails = ""

    def append(self, *events: Event) -> None:
        if self.fails == "before":
            raise StoreError("cut off before the write")
        super().append(*events)
        if self.fails == "after":
            raise StoreError("cut off after the write")


@dataclass
class Model:
    """What exactly once means: the first update accepted for a round and client is the only one, for ever."""

    accepted: dict[tuple[int, str], str] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    """What each update, by its digest, adds to every value."""

    def answer(self, header: UpdateHeader) -> bool | None:
        """Whether it is a duplicate, as far as this alone decides: None lets the round decide.

        Raises:
            ProtocolError: Another update has its place.
        """
        first = self.accepted.get((header.round, header.client))
        if first not in (None, header.digest):
            raise ProtocolError
        return first == header.digest or None

    def adapter(self, rounds: int) -> float:
        """What every value has moved by after so many rounds."""
        moved = 0.0
        for round in range(rounds):
            shifts = [self.shifts[digest] for (number, _), digest in self.accepted.items() if number == round]
            moved += sum(shifts) / len(shifts)
        return moved


Message = tuple[UpdateHeader, bytes, int]


class ExactlyOnce(RuleBasedStateMachine):
    """Three clients, a coordinator that dies, and a network that keeps every message it has ever carried."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fedloom-game-"))
        self.now_s = 0.0
        self.model = Model()
        self.wire: list[Message] = []
        self.joined: dict[str, tuple[str, int]] = {}
        self.acknowledged: set[tuple[int, str, str]] = set()

    @initialize()
    def begin(self) -> None:
        self.start()
        for name in NAMES:
            self.join(name)
            self.coordinator.work(name, *self.joined[name])

    def start(self) -> None:
        self.store = Dying(self.folder, durable=False)
        self.coordinator = Coordinator(CONFIG, SCHEMA, FedAvg(), self.store, starting=START, clock=lambda: self.now_s)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)

    def join(self, name: str) -> None:
        joined = self.coordinator.join(name, 1, 0)
        self.joined[name] = joined.run, joined.epoch

    def current(self, name: str) -> tuple[str, int]:
        """The client's address of the coordinator; it joins again if that has restarted."""
        if self.joined[name][1] != self.coordinator.epoch:
            self.join(name)
        return self.joined[name]

    @rule(name=st.sampled_from(NAMES), level=st.integers(1, 3), poisoned=st.sampled_from([False] * 9 + [True]))
    def train(self, name: str, level: int, poisoned: bool) -> None:
        """Ask for work and put an update on the wire; different levels are different updates for one round."""
        answer = self.coordinator.work(name, *self.current(name))
        if not isinstance(answer, Assignment):
            return
        derived = upload_schema(SCHEMA, answer)
        # Powers of eight: no other set of updates, each counted any number of times below 8, has the same sum.
        shift = float(level * 8 ** NAMES.index(name))
        value = np.nan if poisoned else shift
        payload = codec("fp32").encode(derived, {s.name: np.full(s.shape, value, np.float32) for s in derived.tensors})
        digest = hashlib.sha256(payload).hexdigest()
        self.model.shifts[digest] = shift
        header = UpdateHeader(name, answer.round, derived.digest, "fp32", len(payload), digest)
        self.wire.append((header, payload, self.joined[name][1]))

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), fault=st.sampled_from(["", "", "", "", "stale epoch", "damaged", "before", "after"]))
    def deliver(self, data: st.DataObject, fault: str) -> None:
        """Let one message of any age arrive, once more or for the first time."""
        recent = data.draw(st.integers(1, min(6, len(self.wire))) | st.integers(1, len(self.wire)))
        header, payload, epoch = self.wire[-recent]
        run, now = self.current(header.client)
        if fault == "damaged":
            payload = payload[:-1] + bytes([payload[-1] ^ 1])
        if fault == "stale epoch" and epoch != now:
            with pytest.raises(ProtocolError, match="join again"):
                self.coordinator.submit(header, payload, run, epoch)
            return
        self.store.fails = fault if fault in ("before", "after") else ""
        expected, got = self.outcome(lambda: self.model.answer(header)), None
        try:
            got = self.outcome(lambda: self.coordinator.submit(header, payload, run, now))
        except StoreError:
            assert fault in ("before", "after")
            with pytest.raises(StoreError, match="cut off"):  # memory may be ahead of the disk: nobody is answered
                self.coordinator.submit(header, payload, run, now)
            self.restart()
            return
        finally:
            self.store.fails = ""
        key = (header.round, header.client)
        if expected is not None:
            assert got == expected
        elif fault == "damaged":
            assert got is not False
        if got is False:
            assert key not in self.model.accepted
            self.model.accepted[key] = header.digest
        if got in (True, False):
            self.acknowledged.add((*key, header.digest))

    @staticmethod
    def outcome(call: Callable[[], bool | None]) -> bool | type[Exception] | None:
        try:
            return call()
        except (ProtocolError, UpdateRejected) as error:
            return type(error)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.start()

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        self.coordinator.leave(name, *("bye", *self.current(name)))

    @rule(seconds=st.sampled_from([1.0, 15.0, 61.0]), alive=st.sets(st.sampled_from(NAMES)))
    def wait(self, seconds: float, alive: set[str]) -> None:
        """Time passes; some clients are heard of, for the others it may be a lease or the deadline."""
        self.now_s += seconds
        for name in sorted(alive):
            self.coordinator.heartbeat(name, *self.current(name))
        self.coordinator.tick()

    @invariant()
    def each_update_counts_once(self) -> None:
        if not hasattr(self, "store"):
            return
        events = self.store.events()
        logged = [event for event in events if isinstance(event, UpdateAccepted)]
        keys = [(event.round, event.client) for event in logged]
        assert len(keys) == len(set(keys)), "an update is in the log twice"
        found = {(event.round, event.client): event.digest for event in logged}
        for key, digest in found.items():
            # An outcome that the client was not told: the log decides, and never changes its mind.
            assert self.model.accepted.setdefault(key, digest) == digest, "another update took an accepted one's place"
        assert found == self.model.accepted, "an accepted update is gone"
        assert self.acknowledged <= {(*key, digest) for key, digest in found.items()}, "an acknowledged one is gone"
        for event in events:
            if isinstance(event, RoundClosed):
                assert sorted(event.clients) == sorted(name for number, name in found if number == event.round)
        commits = sum(isinstance(event, AdapterCommitted) for event in events)
        state = self.coordinator.state
        assert state.round == commits
        trained = state.adapter["m.B"] - START["m.B"]
        np.testing.assert_allclose(trained, self.model.adapter(commits), rtol=1e-5)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_every_update_counts_exactly_once() -> None:
    run_state_machine_as_test(
        ExactlyOnce,
        settings=settings(
            max_examples=1000 if PROVE else 30,
            stateful_step_count=100 if PROVE else 40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
