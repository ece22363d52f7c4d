"""Strategies see what a client's evaluation released with its update, and see it again after a crash."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.privacy.dp_sgd.rng import System
from fedloom.client.training.local_eval import released
from fedloom.core.config.run import RunConfig
from fedloom.server.rounds.evaluation import client_metrics
from fedloom.server.storage.local import Store
from fedloom.strategies.api import State, Update
from fedloom.strategies.state import state_to_bytes
from fedloom.strategies.transforms.average import Average, Sum, select
from tests.server.conftest import Federation
from tests.server.conftest import config as configure

CLIENTS = ("ann", "ben", "cat")
ROWS = np.array([[1.0, 0.25], [0.0, 0.5], [1.0, 0.0], [1.0, 0.25]])
SCORES = {name: released([ROWS[: 2 + index]], None, System()) for index, name in enumerate(CLIENTS)}


@dataclass(frozen=True)
class ByAccuracy(Average):
    """Weighs by accuracy, and notes what it has seen."""

    seen: list[tuple[str, str, dict[str, float]]] = field(default_factory=list)

    def check(self, state: State, update: Update) -> None:
        self.seen.append(("check", update.client, dict(update.metrics)))

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        self.seen.append(("fold", update.client, dict(update.metrics)))
        return super().fold(state, acc, replace(update, weight=update.metrics.get("accuracy", 1.0)))


def run_of(**section: object) -> RunConfig:
    return configure(
        2,
        rounds={"min_clients": 3},
        privacy={"enabled": False},
        federated_evaluation={"enabled": True, "every": 2, **section},
    )


def federation(store: Store, strategy: ByAccuracy) -> Federation:
    found = Federation(store, run_of(), strategy, expect=3)
    found.begin(*CLIENTS)
    return found


def send(to: Federation, clients: Sequence[str]) -> None:
    for client in clients:
        header, payload = to.update(client)
        to.send(replace(header, score=SCORES[client] if header.round == 0 else ()), payload)


def test_fold_and_check_see_them_in_rounds_with_an_evaluation(store: Store) -> None:
    strategy = ByAccuracy(select())
    run = federation(store, strategy)
    send(run, CLIENTS)

    at_check, at_fold = ({name: m for where, name, m in strategy.seen if where == each} for each in ("check", "fold"))
    assert at_check == at_fold == {name: client_metrics(run.config, SCORES[name]) for name in CLIENTS}
    assert at_fold["ben"]["held_out_rows"] == pytest.approx(3.0)
    assert at_fold["ben"]["accuracy"] == pytest.approx(2 / 3)
    assert at_fold["ben"]["loss"] == pytest.approx(0.25 * 2 * np.log(2), abs=1e-6)

    strategy.seen.clear()
    send(run, CLIENTS)
    assert run.coordinator.finished
    assert [metrics for *_, metrics in strategy.seen] == [{}] * 6, "the second round has no evaluation"


@pytest.mark.parametrize("sent", [1, 2])
def test_a_coordinator_that_comes_back_sees_the_same(tmp_path: Path, sent: int) -> None:
    whole = ByAccuracy(select())
    with Store(tmp_path / "whole", durable=False) as store:
        run = federation(store, whole)
        send(run, CLIENTS)
        expected = state_to_bytes(run.coordinator.state)

    with Store(tmp_path / "halves", durable=False) as store:
        send(federation(store, ByAccuracy(select())), CLIENTS[:sent])
    after = ByAccuracy(select())
    with Store(tmp_path / "halves", durable=False) as store:
        run = federation(store, after)
        send(run, CLIENTS[sent:])
        assert state_to_bytes(run.coordinator.state) == expected
    folded = [[each for each in seen if each[0] == "fold"] for seen in (whole.seen, after.seen)]
    assert folded[0] == folded[1]


def test_figures_that_drown_in_noise_are_left_out_and_the_others_stay_in_their_range() -> None:
    noised = run_of().model_copy(update={"privacy": configure().privacy})
    assert noised.privacy.enabled
    assert client_metrics(noised, (30 / 3**0.5, 20.0, 20.0)) == {}
    assert client_metrics(noised, ()) == {}

    spoilt = client_metrics(noised, (900.0, -50.0, 5000.0))

    assert spoilt["accuracy"] == 0.0
    assert spoilt["loss"] == pytest.approx(2 * np.log(2))
    both = client_metrics(run_of(personalised=True), tuple(np.array([100, 50, 25, 75, 10]) / 5**0.5))
    assert both == pytest.approx(
        {
            "held_out_rows": 100,
            "accuracy": 0.5,
            "loss": 0.25 * 2 * np.log(2),
            "personalised_accuracy": 0.75,
            "personalised_loss": 0.1 * 2 * np.log(2),
        }
    )
