import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.errors import ConfigError, ProtocolError, StoreError
from fedloom.proto.messages import Assignment
from fedloom.server.rounds.state import Event, RoundClosed
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State, Strategy
from fedloom.strategies.drift.scaffold import SCAFFOLD
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.state import state_to_bytes
from fedloom.strategies.transforms.user_level_dp import UserLevel


class Crash(Exception):
    """The process dies here."""


class Dying(Store):
    """A store whose process dies just before or just after its n-th write."""

    left = -1
    after = False

    def append(self, *events: Event) -> None:
        self._step(lambda: Store.append(self, *events))

    def put_blob(self, blob: bytes, digest: str | None = None) -> str:
        self._step(lambda: Store.put_blob(self, blob, digest))
        return digest or hashlib.sha256(blob).hexdigest()

    def sweep(self, keep: object) -> None:
        self._step(lambda: Store.sweep(self, keep))  # type: ignore[arg-type]  # handed on as it came

    def _step(self, write: Callable[[], None] | Callable[[], str]) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Crash
        write()
        if self.left == 0:
            raise Crash


def run_to_the_end(
    federate: Any, configure: Any, folder: Path, strategy: Strategy, crash_at: int = 0, after: bool = False
) -> tuple[str, int]:
    """Run three clients over two rounds, restarting after the crash; the final state's digest and the writes."""
    names = ("ann", "ben", "cat")
    steps = 10**9
    crashes = 0
    while True:
        with Dying(folder, durable=False) as store:
            store.left, store.after = (crash_at if crash_at and not crashes else steps), after
            try:
                federation = federate(store, configure(rounds={"min_clients": 3}), strategy)
                federation.begin(*names)
                while not federation.coordinator.finished:
                    for name in names:
                        if isinstance(federation.work(name), Assignment):
                            federation.send(*federation.update(name))
                state = federation.coordinator.state
                assert crashes == (1 if crash_at else 0)
                return hashlib.sha256(state_to_bytes(state)).hexdigest(), steps - store.left
            except Crash:
                crashes += 1


STRATEGIES = {
    "fedavg": FedAvg(),
    "fedsvd": FedSVD(),
    "scaffold": SCAFFOLD(),
    "user-level": UserLevel(FedSVD(), bytes(32), 3, 0.5, 1.0, target_quantile=0.5),
    "user-level tree": UserLevel(FedAvg(), bytes(32), 3, 0.5, 1.0, "tree"),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_changes_nothing_in_the_result(
    federate: Any, configure: Any, tmp_path: Path, strategy: Strategy, after: bool
) -> None:
    expected, writes = run_to_the_end(federate, configure, tmp_path / "smooth", strategy)
    assert writes > 15

    for crash_at in range(1, writes + 1):
        digest, _ = run_to_the_end(federate, configure, tmp_path / str(crash_at), strategy, crash_at, after)
        assert digest == expected, f"crash at write {crash_at}"


def test_a_logged_closing_is_not_decided_again(federate: Any, configure: Any, tmp_path: Path) -> None:
    section: dict[str, object] = {"deadline_s": 5.0}
    with Dying(tmp_path, durable=False) as store:
        federation = federate(store, configure(rounds=section), expect=3)
        federation.begin("ann", "ben", "cat")
        federation.send(*federation.update("ann"))
        federation.send(*federation.update("ben"))
        late = federation.update("cat")
        federation.now_s, store.left, store.after = 6.0, 1, True
        with pytest.raises(Crash):
            federation.coordinator.tick()

    with Store(tmp_path, durable=False) as store:
        again = federate(store, configure(rounds=section))
        assert again.coordinator.progress.round == 1
        again.join("cat")
        with pytest.raises(ProtocolError, match="is for round 1"):
            again.send(*late)
        assert RoundClosed(0, ("ann", "ben"), "deadline") in store.events()


def test_after_a_restart_the_cohort_has_one_lease_to_come_back(federate: Any, tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, expect=3)
        federation.begin("ann", "ben", "cat")
        sent = federation.update("ann")
        federation.send(*sent)
        federation.send(*federation.update("ben"))

    with Store(tmp_path, durable=False) as store:
        again = federate(store)
        assert (again.coordinator.epoch, again.coordinator.progress.round) == (2, 0)
        with pytest.raises(ProtocolError, match="now 2; join again"):
            again.coordinator.work("ann", *federation.runs["ann"])
        again.join("ann")
        assert again.send(*sent) is True
        again.now_s = 10.1
        again.coordinator.tick()
        assert again.coordinator.progress.round == 1


def test_after_a_restart_a_finished_run_waits_for_everybody_who_took_part(
    federate: Any, configure: Any, tmp_path: Path
) -> None:
    """Found by the kill grid: the first to come back was served, and the others found nobody any more."""
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, configure(1))
        federation.begin("ann", "ben")
        federation.send(*federation.update("ann"))
        federation.send(*federation.update("ben"))
        assert federation.coordinator.finished

    with Store(tmp_path, durable=False) as store:
        again = federate(store, configure(1))
        again.join("ann")
        ending = again.work("ann")
        again.coordinator.blob("ann", ending.digest, *again.runs["ann"])

        assert not again.coordinator.over
        again.now_s = 10.1
        assert again.coordinator.over


def test_after_a_restart_the_next_round_asks_those_of_the_last(federate: Any, configure: Any, tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, configure(), expect=3)
        federation.begin("ann", "ben", "cat")
        for name in ("ann", "ben", "cat"):
            federation.send(*federation.update(name))
        federation.coordinator.leave("cat", "test", *federation.runs["cat"])

    with Store(tmp_path, durable=False) as store:
        assert federate(store, configure()).coordinator.progress.cohort == ("ann", "ben", "cat")


def test_a_directory_of_another_run_file_is_refused(federate: Any, configure: Any, tmp_path: Path) -> None:
    with Store(tmp_path, durable=False) as store:
        federate(store)

    with Store(tmp_path, durable=False) as store, pytest.raises(ConfigError, match="another run file"):
        federate(store, configure(train={"learning_rate": 0.2}))


def test_after_a_failed_write_nothing_is_answered(federate: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = federate(store)
    federation.begin("ann", "ben")
    update = federation.update("ann")

    def fail(*events: Event) -> None:
        raise StoreError("disk gone")

    monkeypatch.setattr(store, "append", fail)
    with pytest.raises(StoreError, match="disk gone"):
        federation.send(*update)
    monkeypatch.undo()

    for call in (lambda: federation.work("ann"), lambda: federation.send(*update), federation.coordinator.tick):
        with pytest.raises(StoreError, match="disk gone"):
            call()


def test_a_result_that_is_not_finite_is_not_committed(federate: Any, store: Store) -> None:
    class Overflowing(FedAvg):
        def commit(self, state: State, acc: object) -> State:
            good = super().commit(state, acc)
            return replace(good, adapter={**good.adapter, "head": np.full((2, 4), np.inf, np.float32)})

    federation = federate(store, strategy=Overflowing())
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))

    with pytest.raises(StoreError, match="nothing is committed"):
        federation.send(*federation.update("ben"))
    assert isinstance(store.events()[-1], RoundClosed)
