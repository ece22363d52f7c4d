import itertools
import logging
import math
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedloom.core.config.run import RunConfig, SecureAggregationSection, UserLevelSection
from fedloom.core.errors import BudgetError, ConfigError, UpdateRejected
from fedloom.proto.messages import Assignment, Finished
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.privacy.user_ledger import check_supply, eligible, participations, settled, spent, statement
from fedloom.server.rounds.state import RoundClosed, RoundOpened
from fedloom.server.storage.local import Store
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.state import state_to_bytes
from fedloom.strategies.transforms.coded_broadcast import CodedBroadcast
from fedloom.strategies.transforms.tree_noise import sensitivity
from fedloom.strategies.transforms.user_level_dp import UserLevel


def section(**keys: Any) -> UserLevelSection:
    return UserLevelSection.model_validate({"enabled": True, "cohort": 10, "noise_multiplier": 4.0} | keys)


@pytest.fixture
def run(configure: Any) -> Any:
    """A calibrated run file of two or more rounds with [user_level] and other sections changed."""

    def make(length: int = 2, **keys: Any) -> RunConfig:
        others = {name: keys.pop(name) for name in ("rounds", "strategy") if name in keys}
        user = {"enabled": True, "cohort": 2} | keys
        return calibrated(configure(length, privacy={"enabled": False}, user_level=user, **others))

    return make


@pytest.mark.parametrize("limit", [None, 3, 50])
@pytest.mark.parametrize("rounds", [1, 2, 10, 40])
def test_fresh_noise_costs_what_the_composition_by_losses_says(rounds: int, limit: int | None) -> None:
    """Against dp-accounting's PLD, whose discretisation errs upwards by less than its grid a round."""
    taken = min(rounds, limit or rounds)
    reference = PLDAccountant(value_discretization_interval=1e-4)
    reference.compose(SelfComposedDpEvent(GaussianDpEvent(4.0), taken))

    actual = spent(section(max_participations=limit), rounds)

    assert actual == pytest.approx(reference.get_epsilon(1e-6), abs=3e-3)
    assert actual <= reference.get_epsilon(1e-6)


@pytest.mark.parametrize(("rounds", "limit"), [(1, None), (7, 1), (16, 3), (64, None)])
def test_a_tree_costs_one_gaussian_of_its_sensitivity(rounds: int, limit: int | None) -> None:
    reference = PLDAccountant(value_discretization_interval=1e-4)
    reference.compose(GaussianDpEvent(40.0 / sensitivity(rounds, limit or rounds)))

    actual = spent(section(mechanism="tree", noise_multiplier=40.0, max_participations=limit), rounds)

    assert actual == pytest.approx(reference.get_epsilon(1e-6), abs=1e-3)


def test_no_round_costs_nothing_and_every_round_costs_more() -> None:
    for mechanism in ("gaussian", "tree"):
        costs = [spent(section(mechanism=mechanism), rounds) for rounds in range(30)]

        assert costs[0] == 0.0
        assert all(before < after for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize("keys", [{}, {"mechanism": "tree", "max_participations": 2}, {"epsilon": 0.5}], ids=str)
def test_the_calibrated_multiplier_is_the_smallest_that_keeps_to_the_target(run: Any, keys: dict[str, Any]) -> None:
    user = run(30, **keys).user_level

    assert spent(user, 30) <= user.epsilon
    assert spent(user.model_copy(update={"noise_multiplier": user.noise_multiplier - 1.1e-3}), 30) > user.epsilon


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy": {"weighting": "examples"}}, 'set strategy.weighting = "uniform"'),
        ({"cohort": None}, r"set user_level\.cohort or rounds\.clients_per_round"),
        ({"delta": 0.5}, "no promise to a cohort of 2"),
        ({"noise_multiplier": 0.5}, r"costs one client epsilon .*leave the multiplier out or raise one"),
    ],
)
def test_a_run_file_without_a_guarantee_is_refused(run: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**keys)


def test_the_cohort_is_the_size_of_the_drawn_one_if_nothing_else_is_said(run: Any) -> None:
    assert run(cohort=None, rounds={"clients_per_round": 3}).user_level.cohort == 3


def test_without_user_level_privacy_nothing_changes(configure: Any) -> None:
    config = configure(strategy={"weighting": "examples"})

    assert settled(config) == config.user_level
    assert statement(config.user_level, 5) is None
    assert build_strategy(config) == CodedBroadcast(FedAvg(), "auto")


def test_the_strategy_is_wrapped_with_a_new_secret_each_time(run: Any) -> None:
    config = run(target_quantile=0.5, clip_norm=0.25)

    one, two = build_strategy(config), build_strategy(config)

    assert isinstance(one, UserLevel)
    assert isinstance(two, UserLevel)
    assert one.secret != two.secret
    assert replace(one, secret=two.secret) == two
    assert (one.cohort, one.clip_norm, one.target_quantile) == (2, 0.25, 0.5)
    assert one.noise_multiplier == config.user_level.noise_multiplier


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 1e-3}, {"cohort": 1}, {"clip_norm": 9.0}, {"mechanism": "tree"}], ids=str
)
def test_a_strategy_that_does_not_do_what_is_charged_for_is_refused(
    federate: Any, run: Any, store: Store, change: dict[str, Any]
) -> None:
    config = run()
    strategy = build_strategy(config)
    assert isinstance(strategy, UserLevel)

    for bad in (replace(strategy, **change), strategy.inner):
        with pytest.raises(ConfigError, match="does not carry it out"):
            federate(store, config, bad)


def train(federation: Any, *names: str) -> None:
    for name in names:
        if isinstance(federation.work(name), Assignment):
            federation.send(*federation.update(name))


def test_a_round_beyond_the_budget_is_not_opened(federate: Any, run: Any, store: Store) -> None:
    config = run()
    tight = config.user_level.model_copy(
        update={"epsilon": (spent(config.user_level, 1) + config.user_level.epsilon) / 2}
    )
    federation = federate(store, config.model_copy(update={"user_level": tight}), build_strategy(config))
    federation.begin("ann", "ben")

    with pytest.raises(BudgetError, match=r"round 2 is not opened.*export the adapter as it is"):
        train(federation, "ann", "ben")

    assert federation.coordinator.state.round == 1
    assert [event.round for event in store.events() if isinstance(event, RoundOpened)] == [0]


def test_a_client_is_not_asked_beyond_its_participations_also_after_a_restart(
    federate: Any, run: Any, tmp_path: Path
) -> None:
    config = run(3, max_participations=2, rounds={"min_clients": 1})
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, config, build_strategy(config))
        federation.begin("ann")
        train(federation, "ann")
    with Store(tmp_path, durable=False) as store:
        federation = federate(store, config, build_strategy(config))
        federation.begin("ann")
        train(federation, "ann")
        assert federation.coordinator.progress.round == 2
        assert not isinstance(federation.work("ann"), Assignment)

        federation.join("ben")
        train(federation, "ben")

        assert federation.coordinator.finished
        assert isinstance(federation.work("ann"), Finished)
        assert participations(store.events()) == {"ann": 2, "ben": 1}


def test_only_clients_below_the_limit_are_eligible() -> None:
    taken = Counter(ann=2, ben=1)
    names = ["ann", "ben", "cat"]

    assert eligible(section(max_participations=2), taken, names) == ["ben", "cat"]
    assert eligible(section(), taken, names) == names
    assert eligible(section(enabled=False, max_participations=2), taken, names) == names
    assert participations([RoundClosed(0, ("ann", "ben"), "complete"), RoundClosed(1, ("ann",), "deadline")]) == taken


@pytest.mark.parametrize(
    ("clients", "size", "rounds", "limit", "enough"),
    [(3, None, 2, 2, True), (3, None, 3, 2, False), (10, 2, 9, 2, True), (10, 2, 10, 2, False), (4, 2, 50, None, True)],
)
def test_a_simulation_that_could_run_out_of_clients_is_refused(
    run: Any, clients: int, size: int | None, rounds: int, limit: int | None, enough: bool
) -> None:
    """With 2 of 10 clients a round, twice each, 8 rounds can use up 8 clients and leave a ninth its two."""
    sizes = {} if size is None else {"clients_per_round": size}
    config = run(rounds, max_participations=limit, rounds={"min_clients": 2, **sizes})

    if enough:
        check_supply(config, clients)
    else:
        with pytest.raises(ConfigError, match=r"raise user_level\.max_participations"):
            check_supply(config, clients)


def test_another_user_level_section_does_not_take_over_a_run(federate: Any, run: Any, tmp_path: Path) -> None:
    config, other = run(), run(clip_norm=2.0)
    with Store(tmp_path, durable=False) as store:
        federate(store, config, build_strategy(config))

    with Store(tmp_path, durable=False) as store, pytest.raises(ConfigError, match="another run file"):
        federate(store, other, build_strategy(other))


def test_secure_sums_of_updates_that_must_be_clipped_are_refused(federate: Any, run: Any, store: Store) -> None:
    config = run(rounds={"min_clients": 3})
    secure = config.model_copy(update={"secure_aggregation": SecureAggregationSection(enabled=True)})

    with pytest.raises(ConfigError, match=r"user_level.enabled with .* must clip every client's update.*switch one of"):
        federate(store, secure, build_strategy(secure))


def test_weights_cannot_come_in_through_the_coordinator(federate: Any, run: Any, store: Store) -> None:
    config = run()
    weighted = config.model_copy(update={"strategy": config.strategy.model_copy(update={"weighting": "examples"})})
    federation = federate(store, weighted, build_strategy(config))
    federation.begin("ann", "ben", examples=7)

    with pytest.raises(UpdateRejected, match="weight 7"):
        train(federation, "ann")


def _everything_said(federation: Any, store: Store, names: tuple[str, ...]) -> Iterator[bytes]:
    """All that leaves the coordinator in a run: answers, payloads, the log of events."""
    for name in names:
        yield repr(federation.coordinator.join(name, 1, 0)).encode()
    while not federation.coordinator.finished:
        for name in names:
            answer = federation.work(name)
            yield repr(answer).encode()
            if isinstance(answer, Assignment):
                yield federation.coordinator.blob(name, answer.broadcast_digest, *federation.runs[name])
                federation.send(*federation.update(name))
    ending = federation.work(names[0])
    yield repr(ending).encode()
    yield federation.coordinator.blob(names[0], ending.digest, *federation.runs[names[0]])
    yield repr(store.events()).encode()
    yield repr(federation.coordinator.progress).encode()


def test_the_secret_stays_in_the_state(
    federate: Any, run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = run()
    strategy = build_strategy(config)
    assert isinstance(strategy, UserLevel)
    with Store(tmp_path / "state", durable=False) as store:
        federation = federate(store, config, strategy)
        federation.begin("ann", "ben")

        said = [*_everything_said(federation, store, ("ann", "ben")), caplog.text.encode()]

        assert len(said) > 10
        written = (strategy.secret, strategy.secret.hex().encode(), repr(list(strategy.secret))[1:-1].encode())
        assert not [part for part in said for form in written if form in part]
        assert strategy.secret in state_to_bytes(federation.coordinator.state)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_the_statement_says_what_and_for_whom(run: Any) -> None:
    config = run(20, mechanism="tree", max_participations=1, epsilon=3.0)

    found = statement(config.user_level, 20)

    assert found is not None
    assert found["unit"] == "one client"
    assert "zero out" in found["adjacency"]
    assert found["epsilon"] == spent(config.user_level, 20) <= 3.0
    assert math.isclose(found["epsilon"], 3.0, abs_tol=0.01)
    assert found["mechanism"].startswith("tree noise added by a trusted coordinator")
