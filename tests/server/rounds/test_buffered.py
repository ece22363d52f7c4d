"""Buffered rounds (FedBuff): clients at their own pace, one log, one result."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.core.config.run import RoundsSection, RunConfig
from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.proto.messages import Assignment, Wait
from fedloom.server.monitoring.participation import rounds_asked
from fedloom.server.rounds.scheduling import asking, decision
from fedloom.server.rounds.state import (
    AdapterCommitted,
    ClientAsked,
    ClientLost,
    Event,
    RoundClosed,
    Rounds,
    RunCreated,
    UpdateAccepted,
    apply,
    event_from_json,
    event_to_json,
)
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Traits
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.state import state_to_bytes

NAMES = ("ann", "ben", "cat", "dan")


def buffered(configure: Any, length: int = 3, **section: object) -> Any:
    return configure(
        length, rounds={"mode": "buffered", "clients_per_round": 2, "min_clients": 2, "lease_s": 1e6, **section}
    )


def test_a_stale_update_counts_by_its_age_in_the_round_it_comes_to(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure, 2))
    federation.begin("ann", "ben", "cat")
    start = federation.adapter()
    slow = federation.update("cat", 3.0)

    federation.send(*federation.update("ann", 1.0))
    federation.send(*federation.update("ben", 3.0))
    np.testing.assert_allclose(federation.adapter()["head"], np.array(start["head"]) + 2.0, rtol=1e-6)
    assert federation.assignment("ann").round == 1, "nobody waits for cat"
    federation.send(*federation.update("ann", 1.0))
    federation.send(*slow)

    moved = 2.0 + (1.0 + 3.0 / math.sqrt(2)) / 2
    np.testing.assert_allclose(federation.adapter()["head"], np.array(start["head"]) + moved, rtol=1e-6)
    closed = [event for event in store.events() if isinstance(event, RoundClosed)]
    assert closed == [RoundClosed(0, ("ann", "ben"), "complete"), RoundClosed(1, ("ann", "cat"), "complete")]
    assert federation.coordinator.finished


def test_where_all_are_waited_for_it_is_the_synchronous_run(federate: Any, configure: Any, tmp_path: Path) -> None:
    """Staleness 0 and as many updates as clients: FedAvg, to the byte."""
    ends = []
    for mode in ("buffered", "synchronous"):
        with Store(tmp_path / mode, durable=False) as store:
            run = configure(3, rounds={"mode": mode, "clients_per_round": 3, "min_clients": 3})
            federation = federate(store, run)
            federation.begin("ann", "ben", "cat")
            for _ in range(3):
                sent = [federation.update(name) for name in ("ann", "ben", "cat")]
                for each in sent:
                    federation.send(*each)
            assert federation.coordinator.finished
            ends.append(state_to_bytes(federation.coordinator.state))

    assert ends[0] == ends[1]


def test_an_update_that_is_too_old_is_told_so(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure, 5, max_staleness=1))
    federation.begin("ann", "ben", "cat", "dan")
    slow, slower = federation.update("cat"), federation.update("dan")
    for _ in range(2):
        if federation.coordinator.progress.round == 1:
            federation.send(*slow)
            federation.send(*federation.update("ann"))
            break
        federation.send(*federation.update("ann"))
        federation.send(*federation.update("ben"))

    with pytest.raises(ProtocolError, match="round 1, which was closed without it or more than 1 rounds ago; drop it"):
        federation.send(*slower)
    assert federation.send(*slow) is True, "it was counted, and is known for ever"
    assert federation.assignment("dan").round == 2
    with pytest.raises(ProtocolError, match="is for round 1"):
        federation.send(*slower)


def test_a_client_is_in_a_buffer_once_and_waits_for_the_next(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure))
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))

    assert federation.work("ann") == Wait(0.0)
    federation.send(*federation.update("ben"))
    assert federation.assignment("ann").round == 1


def test_only_so_many_are_at_work_at_a_time(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure, concurrency=2))
    federation.join(*NAMES)
    woken: list[int] = []

    assert federation.work("ann") == Wait(0.0), "the round opens with the second"
    assert isinstance(federation.work("ben"), Assignment)
    assert isinstance(federation.work("cat"), Assignment)
    assert federation.work("ann") == federation.work("dan") == Wait(0.0)
    federation.coordinator.wake = lambda: woken.append(1)
    federation.send(*federation.update("ben"))
    assert woken, "whoever waits for a place must be told"
    assert isinstance(federation.work("dan"), Assignment)
    assert federation.work("ann") == Wait(0.0)
    assert isinstance(federation.work("cat"), Assignment), "asking again takes no second place"


def test_a_slow_client_fetches_what_it_was_asked_for_after_the_next_round_has_opened(
    federate: Any, configure: Any, tmp_path: Path
) -> None:
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, buffered(configure))
        federation.begin("ann", "ben", "cat")
        slow = federation.assignment("cat")
        federation.send(*federation.update("ann"))
        federation.send(*federation.update("ben"))
        payload = federation.coordinator.blob("cat", slow.broadcast_digest, *federation.runs["cat"])
        assert hashlib.sha256(payload).hexdigest() == slow.broadcast_digest

    with Store(tmp_path, durable=False) as store:
        again = federate(store, buffered(configure))
        again.join("cat")
        assert again.coordinator.blob("cat", slow.broadcast_digest, *again.runs["cat"]) == payload


def test_a_blob_that_lands_while_a_round_is_committed_is_not_swept(
    federate: Any, configure: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = federate(store, buffered(configure, 2))
    federation.begin("ann", "ben", "cat")
    slow = federation.update("cat")
    put = Store.put_blob

    def interrupted(self: Store, blob: bytes, digest: str | None = None) -> str:
        kept = put(self, blob, digest)
        if digest == slow[0].digest:
            monkeypatch.undo()
            federation.send(*federation.update("ann"))
            federation.send(*federation.update("ben"))
            assert federation.coordinator.progress.round == 1
        return kept

    monkeypatch.setattr(Store, "put_blob", interrupted)
    federation.send(*slow)

    assert store.get_blob(slow[0].digest) == slow[1]


def test_a_lost_client_may_come_back_with_its_old_update(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure, lease_s=10.0))
    federation.begin("ann", "ben", "cat")
    slow = federation.update("cat", 1.0)
    federation.now_s = 11.0
    federation.join("ann", "ben")
    for name in ("ann", "ben"):
        federation.send(*federation.update(name))
    assert federation.coordinator.progress.lost == {"cat": "lease"}

    assert federation.send(*slow) is False
    assert federation.coordinator.progress.submitted == ("cat",)


def test_everybody_asked_is_counted_as_asked(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure))
    federation.begin("ann", "ben", "cat")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))
    federation.work("ann")

    asked = [event for event in store.events() if isinstance(event, ClientAsked)]
    assert ClientAsked(1, "ann") in asked
    assert rounds_asked(store.events()) == {"ann": 2, "ben": 1, "cat": 1}


def test_when_everybody_is_in_the_buffer_it_does_not_wait_for_more(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, buffered(configure, clients_per_round=3))
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("ben"))

    assert federation.coordinator.progress.round == 1


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"rounds": {"clients_per_round": None}}, "needs rounds.clients_per_round"),
        ({"rounds": {"dropout_rate": 0.1}}, "dropout_rate"),
        ({"secure_aggregation": {"enabled": True}}, "weighs updates by their age"),
        ({"user_level": {"enabled": True}}, "weighs updates by their age"),
    ],
)
def test_what_makes_no_sense_buffered_is_refused(
    federate: Any, configure: Any, store: Store, sections: dict[str, dict[str, object]], text: str
) -> None:
    rounds = {"mode": "buffered", "clients_per_round": 3, "min_clients": 3, **sections.get("rounds", {})}
    with pytest.raises(ConfigError, match=text):
        federate(store, configure(**{**sections, "rounds": rounds}))


def test_a_strategy_that_rewrites_or_is_not_linear_is_refused(federate: Any, configure: Any, store: Store) -> None:
    class Choosy(FedAvg):
        traits = Traits(same_tensors=True)

    for strategy in (FedSVD(), Choosy()):
        with pytest.raises(ConfigError, match=f"strategy {type(strategy).__name__} cannot use changes"):
            federate(store, buffered(configure), strategy)


class Crash(Exception):
    """The process dies here."""


class Dying(Store):
    """A store whose process dies just after its n-th write."""

    left = 0

    def append(self, *events: Event) -> None:
        Store.append(self, *events)
        self._step()

    def put_blob(self, blob: bytes, digest: str | None = None) -> str:
        kept = Store.put_blob(self, blob, digest)
        self._step()
        return kept

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash


def steps(federation: Any, sent: dict[tuple[str, int], Any]) -> Iterator[None]:
    """Clients of four different speeds, who keep what they made and send the same again after a restart."""
    turn = 0
    while not federation.coordinator.finished:
        for pace, name in enumerate(NAMES, 1):
            answer = federation.work(name)
            if isinstance(answer, Assignment):
                sent.setdefault((name, answer.round), federation.update(name))
            waiting = [key for key in sent if key[0] == name]
            if waiting and turn % pace == 0:
                with suppress(ProtocolError):  # closed without it: a late update is dropped
                    federation.send(*sent[max(waiting, key=lambda key: key[1])])
            yield
        turn += 1


def run_to_the_end(federate: Any, configure: Any, folder: Path, crash_at: int) -> tuple[str, list[Event], int]:
    sent: dict[tuple[str, int], Any] = {}
    left, writes = crash_at, 0
    while True:
        with Dying(folder, durable=False) as store:
            store.left = left or 10**9
            try:
                federation = federate(store, buffered(configure, 4))
                federation.join(*NAMES)
                for _ in steps(federation, sent):
                    pass
                writes = 10**9 - store.left
                return hashlib.sha256(state_to_bytes(federation.coordinator.state)).hexdigest(), store.events(), writes
            except Crash:
                left = 0


def test_a_log_replays_to_the_same_bytes_wherever_the_process_died(
    federate: Any, configure: Any, tmp_path: Path
) -> None:
    _, _, writes = run_to_the_end(federate, configure, tmp_path / "smooth", 0)
    assert writes > 30

    for crash_at in range(1, writes, 3):
        folder = tmp_path / str(crash_at)
        digest, events, _ = run_to_the_end(federate, configure, folder, crash_at)
        stale = [e for e in events if isinstance(e, UpdateAccepted)]
        assert len({(e.round, e.client) for e in stale}) == len(stale)
        with Store(folder, durable=False) as store:
            replayed = federate(store, buffered(configure, 4))
            assert hashlib.sha256(state_to_bytes(replayed.coordinator.state)).hexdigest() == digest
        # The same updates in the same buffers give the same state, from the log and the updates alone.
        assert fold_by_hand(federate, configure, tmp_path / f"hand{crash_at}", events, folder) == digest


def fold_by_hand(federate: Any, configure: Any, folder: Path, events: list[Event], original: Path) -> str:
    """A fresh run driven by the old log's order: who is asked, whose update comes, and nothing else."""
    with Store(folder, durable=False) as store:
        federation = federate(store, buffered(configure, 4))
        federation.join(*NAMES)
        federation.work("dan")
        for name in NAMES[:3]:
            federation.work(name)
        made: dict[tuple[str, int], Any] = {}
        for event in events:
            if isinstance(event, ClientAsked):
                federation.work(event.client)
                made.setdefault((event.client, event.round), federation.update(event.client))
            elif isinstance(event, UpdateAccepted):
                federation.send(*made[event.client, event.round])
        return hashlib.sha256(state_to_bytes(federation.coordinator.state)).hexdigest()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["ask", "send", "lose", "refuse"]), st.sampled_from(NAMES)), max_size=60))
def test_no_update_older_than_allowed_is_ever_in_a_buffer(moves: list[tuple[str, str]]) -> None:
    section = RoundsSection(mode="buffered", clients_per_round=2, min_clients=2, max_staleness=1, concurrency=3)
    config = RunConfig.model_validate(
        {
            "run": {"name": "trial", "rounds": 50},
            "model": {"base": "tiny", "labels": ["no", "yes"]},
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "rounds": section.model_dump(),
        }
    )
    log: list[Event] = []
    rounds = Rounds()

    def take(event: Event) -> None:
        nonlocal rounds
        log.append(event)
        rounds = apply(rounds, event)

    take(RunCreated("4f", "spec", "schema", "s0"))
    for move, client in moves:
        if move == "ask" and (event := asking(rounds, client, section)):
            assert len(rounds.pending - {client}) < 3
            take(event)
        elif move == "send" and rounds.takes_from(client):
            take(UpdateAccepted(rounds.started(client), client, "d", 1.0))
        elif move in ("lose", "refuse") and client in rounds.pending:
            take(ClientLost(rounds.round, client, "lease" if move == "lose" else "rejected"))
        while decided := decision(rounds, NAMES, config, 0.0):
            take(decided)
            if isinstance(decided, RoundClosed):
                assert len(decided.clients) == 2
                assert all(rounds.round - rounds.updates[each].round <= 1 for each in decided.clients)
                take(AdapterCommitted(rounds.round, f"s{rounds.round + 1}"))

    replayed = Rounds()
    for written in log:
        replayed = apply(replayed, event_from_json(event_to_json(written)))
    assert replayed == rounds
