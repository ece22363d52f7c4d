"""Strategies are code that others write: what they raise is theirs, and a run says so instead of standing still."""

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import StrategyError, UpdateRejected
from fedloom.core.schema import Array, Schema
from fedloom.proto.messages import Finished, Wait
from fedloom.server.rpc.server import serving
from fedloom.server.storage.local import Store
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Failing(FedAvg):
    """FedAvg with a mistake in one place, for some clients or for all."""

    place: str = ""
    clients: tuple[str, ...] = ()

    def _fails(self, place: str, client: str = "") -> None:
        if place == self.place and (not self.clients or client in self.clients):
            raise ValueError("operands could not be broadcast together")

    def init(self, schema: Schema, adapter: Mapping[str, Array], seed: int) -> State:
        self._fails("init")
        return super().init(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        self._fails("plan", client)
        return super().plan(state, round, client)

    def check(self, state: State, update: Update) -> None:
        for name in update.delta:
            if name == "m.B":
                self._fails("check", update.client)

    def fold(self, state: State, acc: Any, update: Update) -> Any:
        self._fails("fold", update.client)
        if acc is not None:
            self._fails("second fold", update.client)
        return super().fold(state, acc, update)

    def commit(self, state: State, acc: Any) -> State:
        self._fails("commit")
        return super().commit(state, acc)


def test_an_update_on_which_the_strategy_fails_is_refused_and_the_round_goes_on(
    federate: Any, configure: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    federation = federate(store, configure(1), Failing(place="check", clients=("ben",)), expect=3)
    federation.begin("ann", "ben", "cat")

    with pytest.raises(
        UpdateRejected, match="the strategy fails on the update of client 'ben'; the round goes on"
    ) as e:
        federation.send(*federation.update("ben"))
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("cat"))

    assert "broadcast together" not in str(e.value)  # what the code of others says stays here
    assert isinstance(federation.work("ann"), Finished)
    federation.coordinator.tick()
    (note,) = [record.detail for record in store.audit() if record.kind == "rejected"]
    assert "strategy 'fedavg' fails in check, on the update of client 'ben' at 'm.B': ValueError: operands" in note
    assert "Traceback" in caplog.text


def test_a_client_without_a_plan_is_left_out(federate: Any, configure: Any, store: Store) -> None:
    federation = federate(store, configure(1), Failing(place="plan", clients=("ben",)), expect=3)
    federation.begin("ann", "ben", "cat")

    assert federation.work("ben") == Wait(0.0)
    federation.send(*federation.update("ann"))
    federation.send(*federation.update("cat"))

    assert federation.coordinator.finished


def test_an_update_that_the_strategy_refuses_is_refused_in_its_words_and_the_round_goes_on(
    federate: Any, configure: Any, store: Store
) -> None:
    class Choosy(FedAvg):
        def check(self, state: State, update: Update) -> None:
            if update.delta["head"].max() > 5:
                raise UpdateRejected(f"client {update.client!r} moves the head by more than 5; lower the rate")

    federation = federate(store, configure(1), Choosy(), expect=3)
    federation.begin("ann", "ben", "cat")

    with pytest.raises(UpdateRejected, match="'ben' moves the head by more than 5"):
        federation.send(*federation.update("ben", 6.0))
    federation.send(*federation.update("ann", 1.0))
    federation.send(*federation.update("cat", 1.0))

    assert federation.coordinator.finished


def test_an_update_is_folded_once_and_not_for_trial(federate: Any, configure: Any, store: Store) -> None:
    folded: list[str] = []

    class Counting(FedAvg):
        def fold(self, state: State, acc: Any, update: Update) -> Any:
            folded.append(update.client)
            return super().fold(state, acc, update)

    federation = federate(store, configure(1), Counting())
    federation.begin("ann", "ben")
    for client in ("ben", "ann"):
        federation.send(*federation.update(client))

    assert folded == ["ann", "ben"]


@pytest.mark.parametrize("place", ["plan", "check"])
def test_a_strategy_that_fails_for_all_ends_the_run(federate: Any, store: Store, place: str) -> None:
    federation = federate(store, strategy=Failing(place=place))

    def to_the_end() -> None:
        federation.begin("ann", "ben")
        federation.work("ann")
        for client in ("ann", "ben"):
            with suppress(UpdateRejected):
                federation.send(*federation.update(client))

    with pytest.raises(StrategyError, match=f"strategy 'fedavg' fails in {place}.*ValueError: operands"):
        to_the_end()
    with pytest.raises(StrategyError):
        federation.coordinator.tick()


def test_a_corrected_strategy_goes_on_from_the_round_that_could_not_be_committed(
    federate: Any, configure: Any, tmp_path: Path
) -> None:
    for place in ("fold", "second fold", "commit"):
        with Store(tmp_path / place, durable=False) as store:
            federation = federate(store, configure(1), Failing(place=place))
            federation.begin("ann", "ben")
            federation.send(*federation.update("ann", 1.0))
            with pytest.raises(StrategyError, match=f"{place.split()[-1]} of round 1.*start again with the same state"):
                federation.send(*federation.update("ben", 3.0))
            with pytest.raises(StrategyError):
                federation.coordinator.check()

        with Store(tmp_path / place, durable=False) as store:
            assert federate(store, configure(1)).coordinator.finished


def test_a_strategy_that_cannot_begin_is_named(federate: Any, store: Store) -> None:
    with pytest.raises(StrategyError, match="strategy 'fedavg' fails in init: ValueError: operands"):
        federate(store, strategy=Failing(place="init"))


def test_a_plan_that_is_none_is_the_strategys_fault(federate: Any, store: Store) -> None:
    class Odd(FedAvg):
        def plan(self, state: State, round: int, client: str) -> Plan:
            return None  # type: ignore[return-value]

    federation = federate(store, strategy=Odd())
    federation.begin("ann", "ben")

    with pytest.raises(StrategyError, match="strategy 'fedavg' fails in plan for client 'ann'"):
        federation.work("ann")


def test_a_server_whose_strategy_fails_ends_with_its_error(
    federate: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    federation = federate(store, strategy=Failing(place="commit"))
    federation.begin("ann", "ben")
    federation.send(*federation.update("ann"))
    update = federation.update("ben")

    with suppress(StrategyError):
        federation.send(*update)

    with pytest.raises(StrategyError, match="fails in commit of round 1"), serving(federation.coordinator):
        threading.Event().wait(0.6)
