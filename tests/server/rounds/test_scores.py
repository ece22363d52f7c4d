"""What the coordinator makes of the clients' evaluations, and which of them it takes."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.privacy.dp_sgd.rng import Seeded, System
from fedloom.client.training.local_eval import released
from fedloom.core.config.evaluation import largest_loss
from fedloom.core.config.run import RunConfig, SecureAggregationSection, UserLevelSection
from fedloom.core.errors import ConfigError, ProtocolError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.spends import evaluations, run_spends
from fedloom.proto.messages import Finished, UpdateHeader
from fedloom.proto.wire import header_from_wire, header_to_wire
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.rounds.evaluation import Scores, federated_score
from fedloom.server.rounds.state import RoundOpened, UpdateAccepted, event_from_json, event_to_json
from fedloom.server.rounds.validation import check_score
from fedloom.server.storage.local import Store
from fedloom.server.validate_config import check_config
from tests.server.conftest import Federation
from tests.server.conftest import config as configure

HEADER = UpdateHeader("ann", 0, "0" * 64, "fp32", 8, "1" * 64)


def run_of(private: bool = True, rounds: int = 10, **section: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "scored", "rounds": rounds},
            "model": {"base": "nowhere", "labels": ["no", "yes"]},
            "train": {"steps": 5, "sampling_rate": 0.05, "learning_rate": 0.1},
            "privacy": {"enabled": private, "epsilon": 6.0, "noise_multiplier": 1.0},
            "federated_evaluation": {"enabled": True, **section},
        }
    )


def rows_of(rng: np.random.Generator, count: int, right: float) -> np.ndarray:
    return np.stack([rng.random(count) < right, rng.random(count) / 2], 1).astype(np.float64)


def test_every_row_of_every_client_counts_the_same() -> None:
    rng = np.random.default_rng(1)
    config = run_of(private=False, personalised=True, max_loss=4.0)
    clients = [[rows_of(rng, count, 0.7), rows_of(rng, count, 0.9)] for count in (30, 170, 4)]
    found = federated_score(config, [released(each, None, System()) for each in clients])
    assert found is not None
    before, after = (np.concatenate([each[i] for each in clients]) for i in (0, 1))
    assert found["accuracy"] == pytest.approx(before[:, 0].mean(), abs=1e-6)
    assert found["loss"] == pytest.approx(4 * before[:, 1].mean(), abs=1e-5)
    assert found["personalised_accuracy"] == pytest.approx(after[:, 0].mean(), abs=1e-6)
    assert found["personalised_loss"] == pytest.approx(4 * after[:, 1].mean(), abs=1e-5)
    share = before[:, 0].mean()
    assert found["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 204), abs=1e-5)


def test_every_figure_has_an_interval_that_holds_it_or_is_null() -> None:
    """195 held-out rows, whose loss was told to 1.3 nats as if it were exact."""
    config, rng = run_of(noise_multiplier=10.0, personalised=True), np.random.default_rng(7)
    noise = Seeded(7)
    assert largest_loss(config) == pytest.approx(2 * math.log(2))
    truth = {"accuracy": 0.8, "loss": 0.25 * largest_loss(config)}
    inside = dict.fromkeys(truth, 0)
    for _ in range(400):
        table = rows_of(rng, 400, 0.8)
        found = federated_score(config, [released([table, table], 10.0, noise) for _ in range(3)])
        assert found is not None
        assert {f"{name}_margin" for name in found if not name.endswith(("margin", "error"))} < found.keys()
        for name, value in truth.items():
            told, margin = found[name], found[f"{name}_margin"]
            assert told is not None
            assert margin is not None
            inside[name] += abs(told - value) <= margin
    assert all(each / 400 >= 0.9 for each in inside.values())

    few = [released([rows_of(rng, 75, 0.8)] * 2, None, System()) for _ in range(2)]  # as noise may leave them
    drowned = federated_score(config, few)
    assert drowned is not None
    assert set(drowned.values()) == {None}


@pytest.mark.parametrize(("labels", "largest"), [(["a", "b"], 1.386), (["a", "b", "c", "d"], 2.773)])
def test_the_largest_loss_is_twice_that_of_guessing(labels: list[str], largest: float) -> None:
    plain = run_of().model_dump() | {"model": {"base": "nowhere", "labels": labels}}
    assert largest_loss(RunConfig.model_validate(plain)) == pytest.approx(largest, abs=1e-3)
    text = run_of().model_dump() | {"model": {"base": "nowhere", "task": "causal-lm", "head": "frozen"}}
    assert largest_loss(RunConfig.model_validate(text)) == 10.0
    assert largest_loss(run_of(max_loss=4.0)) == 4.0


def test_the_standard_error_is_that_of_the_figure() -> None:
    config, rng, noise = run_of(noise_multiplier=10.0), np.random.default_rng(2), Seeded(2)
    found = []
    for _ in range(2000):
        found.append(federated_score(config, [released([rows_of(rng, 500, 0.8)], 10.0, noise) for _ in range(3)]))
    accuracies = np.array([each["accuracy"] for each in found if each is not None])
    errors = np.array([each["standard_error"] for each in found if each is not None])
    assert len(accuracies) == 2000
    assert accuracies.mean() == pytest.approx(0.8, abs=0.005)
    assert accuracies.std() == pytest.approx(errors.mean(), rel=0.1)


def test_figures_that_drown_in_noise_are_not_shown() -> None:
    config, rng, noise = run_of(noise_multiplier=10.0), np.random.default_rng(3), Seeded(3)
    few = [released([rows_of(rng, 5, 0.8)], 10.0, noise)]
    assert federated_score(config, few) is None
    assert federated_score(config, []) is None
    assert federated_score(run_of(private=False), [released([np.zeros((0, 2))], None, System())]) is None
    spoilt = [(1e12, -1e12, 1e12), (5.0, 5.0, 5.0)]
    found = federated_score(config, spoilt)
    assert found is not None
    assert found["accuracy"] == 0.0
    assert 0 <= (found["loss"] or 0.0) <= 10


def test_figures_must_be_those_that_were_asked_for() -> None:
    config = run_of(every=2)
    check_score(replace(HEADER, score=(1.0, 2.0, 3.0)), config)
    check_score(HEADER, config)  # it trained the round anew
    with pytest.raises(ProtocolError, match="'ann' sends 2 figures of an evaluation for round 1; 3 or none"):
        check_score(replace(HEADER, score=(1.0, 2.0)), config)
    with pytest.raises(ProtocolError, match="sends 3 figures of an evaluation for round 2; 0 or none"):
        check_score(replace(HEADER, round=1, score=(1.0, 2.0, 3.0)), config)
    off = config.model_copy(update={"federated_evaluation": type(config.federated_evaluation)()})
    with pytest.raises(ProtocolError, match="0 or none"):
        check_score(replace(HEADER, score=(1.0, 2.0, 3.0)), off)


@pytest.mark.parametrize("score", [(math.nan,), (math.inf, 1.0, 1.0), (1e13, 0.0, 0.0), (0.0,) * 6])
def test_figures_nobody_could_release_are_refused_on_the_wire(score: tuple[float, ...]) -> None:
    with pytest.raises(ProtocolError, match="figures of an evaluation; at most 5"):
        header_from_wire(header_to_wire(replace(HEADER, score=score), "run", 1))
    sent = replace(HEADER, score=(1.5, -2.0, 1e-17))
    assert header_from_wire(header_to_wire(sent, "run", 1))[0] == sent


def test_the_log_keeps_figures_and_says_nothing_where_there_are_none() -> None:
    scored = UpdateAccepted(0, "ann", "1" * 64, 1.0, (1.5, -2.0, 1e-17))
    assert event_from_json(event_to_json(scored)) == scored
    plain = replace(scored, score=())
    assert "score" not in event_to_json(plain), "builds that know of no figures read this log"
    assert event_from_json(event_to_json(plain)) == plain


def test_scores_are_those_of_the_round_that_was_opened_last() -> None:
    config, rng = run_of(private=False), np.random.default_rng(4)
    one, two, three = (released([rows_of(rng, 50, 0.5)], None, System()) for _ in range(3))
    scores = Scores()
    scores.add(RoundOpened(0, 0, "s", ("ann", "ben"), 60.0))
    scores.add(UpdateAccepted(0, "ann", "a", 1.0, one))
    scores.add(RoundOpened(0, 1, "s", ("ann", "cat"), 60.0))  # again, and ann's update stays
    scores.add(UpdateAccepted(0, "cat", "c", 1.0, two))
    assert scores.of(config) == federated_score(config, [one, two])
    scores.add(RoundOpened(1, 0, "s", ("ann", "ben"), 60.0))
    assert scores.of(config) is None
    scores.add(UpdateAccepted(1, "ben", "b", 1.0, three))
    assert scores.of(config) == federated_score(config, [three])


def test_the_result_is_scored_by_those_who_leave_and_outlasts_a_restart(tmp_path: Path) -> None:
    run = configure(1, privacy={"enabled": False}, federated_evaluation={"enabled": True}, model={"labels": ["a", "b"]})
    score = released([np.array([[1.0, 0.25]] * 4)], None, System())
    with Store(tmp_path / "state") as store:
        federation = Federation(store, run)
        federation.begin("ann", "ben")
        with pytest.raises(ProtocolError, match="3 figures on a result; 0 finite ones"):
            federation.coordinator.leave("ann", "", *federation.runs["ann"], score)
        for client in ("ann", "ben"):
            federation.send(*federation.update(client))
        finished = federation.work("ann")
        assert isinstance(finished, Finished)
        federation.coordinator.blob("ann", finished.digest, *federation.runs["ann"])
        assert not federation.coordinator.over, "who has fetched the result has yet to score it"
        for wrong in ((1.0, 2.0), (1.0, math.nan, 0.0)):
            with pytest.raises(ProtocolError, match="3 finite ones are allowed"):
                federation.coordinator.leave("ann", "", *federation.runs["ann"], wrong)
        federation.coordinator.leave("ann", "", *federation.runs["ann"], score)
        federation.coordinator.leave("ann", "", *federation.runs["ann"], (9.0, 9.0, 9.0))
        told = federation.coordinator.told
        assert told == federated_score(run, [score]), "the first one counts"
        assert told is not None
        assert told["accuracy"] == pytest.approx(1.0)
    with Store(tmp_path / "state") as store:
        again = Federation(store, run)
        assert again.coordinator.told == told
        again.join("ben")
        again.work("ben")
        again.coordinator.leave("ben", "", *again.runs["ben"], score)
        assert again.coordinator.told == federated_score(run, [score, score])


def test_the_runs_noise_pays_for_its_evaluations() -> None:
    open_noise = run_of().model_copy(update={"privacy": run_of().privacy.model_copy(update={"noise_multiplier": None})})
    config = calibrated(open_noise)
    noise = config.privacy.noise_multiplier
    assert noise is not None
    whole = [Spend(0.05, noise, 50), Spend(1.0, 10.0, 11)]  # each round's and the result's
    assert epsilon(run_spends(config, 10), 1e-5) == epsilon(whole, 1e-5) <= 6.0
    assert epsilon([Spend(0.05, noise - 0.001, 50), Spend(1.0, 10.0, 11)], 1e-5) > 6.0
    off = open_noise.model_copy(update={"federated_evaluation": type(config.federated_evaluation)()})
    without = calibrated(off).privacy.noise_multiplier
    assert without is not None
    assert without < noise
    dear = open_noise.federated_evaluation.model_copy(update={"noise_multiplier": 1.0})
    with pytest.raises(ConfigError, match=r"11 evaluations alone cost epsilon .* of privacy.epsilon = 6; raise"):
        calibrated(open_noise.model_copy(update={"federated_evaluation": dear}))


@pytest.mark.parametrize(("every", "joined", "count"), [(1, 10, 11), (3, 10, 5), (3, 2, 3), (20, 10, 2), (3, 0, 1)])
def test_evaluations_are_counted_from_above(every: int, joined: int, count: int) -> None:
    config = run_of(every=every)
    assert evaluations(config, joined) == count
    assert sum(config.federated_evaluation.due(each) for each in range(10)) + 1 >= count, "and once at the end"
    assert len(run_spends(config, joined)) == joined + count


def test_what_would_show_a_clients_figures_or_cover_too_little_is_refused() -> None:
    config = run_of()
    with pytest.raises(ValueError, match="promises to hide; choose one of them"):
        RunConfig.model_validate(
            config.model_dump() | {"secure_aggregation": SecureAggregationSection(enabled=True).model_dump()}
        )
    users = config.model_copy(update={"user_level": UserLevelSection(enabled=True)})
    with pytest.raises(ConfigError, match="its noise covers one example, not all of a client's"):
        check_config(users, build_strategy(config))


def test_a_run_without_evaluations_is_told_as_builds_that_know_none_tell_it() -> None:
    off = run_of().model_copy(update={"federated_evaluation": type(run_of().federated_evaluation)()})
    assert "federated_evaluation" not in off.spec.model_dump_json()
    assert "federated_evaluation" in run_of().spec.model_dump_json()
    assert type(off.spec).from_json(off.spec.model_dump_json()) == off.spec
