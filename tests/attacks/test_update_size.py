"""Updates that ruin a run by their size: refused, and the round goes on.

On the code before, an update of 2.1e5 was committed in a run that broadcasts fp16, and every `work` raised from then
on; one of 1e30 was averaged in.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError, UpdateRejected
from fedloom.core.privacy.banded import Banded
from fedloom.core.registry import build
from fedloom.proto.messages import Assignment, Finished
from fedloom.server.build import build_strategy
from fedloom.server.rounds.update_norm import largest_norm
from fedloom.server.storage.local import Store
from fedloom.strategies.ffa import FFA
from fedloom.strategies.transforms.coded_broadcast import steps
from tests.server.conftest import Federation, config

BIG = "max_update_norm"


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "state", durable=False) as opened:
        yield opened


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum", "multi-krum"])
@pytest.mark.parametrize("size", [2.1e5, 66_000.0, -66_000.0])
def test_an_update_that_no_broadcast_could_carry_is_refused_and_the_round_goes_on(
    store: Store, name: str, size: float
) -> None:
    clients = ("ada", "bo", "cy", "di", "ed", "flo")
    rounds: dict[str, object] = {"min_clients": 5, BIG: 1e30}
    run = config(2, strategy={"name": name}, wire={"broadcast": "fp16"}, rounds=rounds)
    federation = Federation(store, run, build_strategy(run), expect=6)
    federation.begin(*clients)

    with pytest.raises(UpdateRejected, match="beyond 65504, the most that wire"):
        federation.send(*federation.update("ada", size))
    for client in clients[1:]:
        federation.send(*federation.update(client))

    assert federation.coordinator.progress.round == 1
    assert isinstance(federation.work("bo"), Assignment)


@pytest.mark.parametrize("name", ["fedavg", "ffa", "fedsvd"])
def test_a_change_that_no_codec_could_carry_is_sent_whole(store: Store, name: str) -> None:
    run = config(3, strategy={"name": name}, wire={"broadcast": "fp16"}, rounds={BIG: 1e30})
    federation = Federation(store, run, build_strategy(run))
    federation.begin("ada", "bo")

    linked = []
    for shift in (None, 66_000.0, None):
        for client in ("ada", "bo"):
            federation.send(*federation.update(client, shift))
        if not federation.coordinator.finished:
            linked.append(bool(steps(federation.coordinator.state)))

    assert linked == [True, False]
    assert federation.coordinator.finished
    assert max(abs(value) for values in federation.adapter().values() for value in values) > 60_000


def run_with_a_void_round(folder: Path, *, restart: bool) -> list[dict[str, list[float]]]:
    """The adapter after each of three rounds, the second of which is poison; `restart` opens the directory anew then.

    FedSVD writes all singular values into B: once the rows of A are orthonormal, B of 60,000 becomes 84,853. It is not
    wrapped here: what clients are sent is the adapter itself.
    """
    strategy = build("strategies", "fedsvd", {})
    run = config(3, strategy={"name": "fedsvd"}, wire={"broadcast": "fp16"}, rounds={BIG: 1e30})
    found = []
    with Store(folder, durable=False) as store:
        federation = Federation(store, run, strategy)
        federation.begin("ada", "bo")
        for round, shift in enumerate((None, 60_000.0, None)):
            if restart and round == 2:
                federation = Federation(store, run, strategy)
                federation.begin("ada", "bo")
            for client in ("ada", "bo"):
                federation.send(*federation.update(client, shift))
            assert federation.coordinator.progress.round == round + 1
            found.append(federation.adapter())
        assert isinstance(federation.work("ada"), Finished)
    return found


def test_updates_that_a_strategy_makes_larger_leave_the_adapter_as_it_was(tmp_path: Path) -> None:
    first, void, last = run_with_a_void_round(tmp_path / "state", restart=False)

    assert void == first
    assert last != first


def test_a_void_round_is_the_same_after_a_restart(tmp_path: Path) -> None:
    plain = run_with_a_void_round(tmp_path / "a", restart=False)

    assert run_with_a_void_round(tmp_path / "b", restart=True) == plain


def test_the_last_round_is_not_held_to_the_codec_of_broadcasts(store: Store) -> None:
    """The final adapter is sent as fp32, but an update beyond fp16 is no less wrong for that."""
    run = config(1, strategy={"name": "fedsvd"}, wire={"broadcast": "fp16"}, rounds={BIG: 1e30})
    federation = Federation(store, run, build_strategy(run))
    federation.begin("ada", "bo")

    for client in ("ada", "bo"):
        federation.send(*federation.update(client, 60_000.0))

    assert isinstance(federation.work("ada"), Finished)


@pytest.mark.parametrize("name", ["fedavg", "ffa", "fedsvd"])
@pytest.mark.parametrize("size", [1e30, 1e20, 1e6])
def test_an_update_that_no_training_of_this_run_comes_to_is_refused(store: Store, name: str, size: float) -> None:
    run = config(strategy={"name": name})
    federation = Federation(store, run, build_strategy(run), expect=3)
    federation.begin("ada", "bo", "cy")

    with pytest.raises(UpdateRejected, match=r"rounds\.max_update_norm = 1000 is allowed"):
        federation.send(*federation.update("ada", size))
    for client in ("bo", "cy"):
        federation.send(*federation.update(client))

    assert federation.coordinator.progress.round == 1
    assert max(abs(value) for values in federation.adapter().values() for value in values) < 100


def test_a_plan_that_no_client_would_take_is_an_error_of_the_coordinators(store: Store) -> None:
    class Eager(FFA):
        def plan(self, state: Any, round: int, client: str) -> Any:
            from dataclasses import replace

            return replace(super().plan(state, round, client), local={"learning_rate": 1e30})

    federation = Federation(store, config(), Eager())
    federation.join("ada", "bo")
    federation.work("ada")

    with pytest.raises(ConfigError, match=r"sets learning_rate to 1e\+30"):
        federation.work("bo")


def private(**train: Any) -> RunConfig:
    return config(
        train={"steps": 10, "sampling_rate": 0.02, "learning_rate": 4.0, **train},
        privacy={"clip_norm": 0.5, "noise_multiplier": 0.6},
    )


def simulated(run: RunConfig, values: int, declared: int, true: int, seed: int) -> float:
    """Norm of a round of private SGD in which every example's gradient is as long as it may be, and all are one."""
    rng = np.random.default_rng(seed)
    train, privacy = run.train, run.privacy
    assert privacy.noise_multiplier is not None
    direction = np.zeros(values)
    direction[0] = privacy.clip_norm
    weight, velocity = np.zeros(values), np.zeros(values)
    for _ in range(train.steps):
        noise = privacy.noise_multiplier * privacy.clip_norm * rng.normal(size=values)
        total = rng.binomial(true, train.sampling_rate) * direction + noise
        velocity = train.momentum * velocity + total / (train.sampling_rate * declared) + train.proximal_mu * weight
        weight -= train.learning_rate * velocity
    return float(np.linalg.norm(weight))


@pytest.mark.parametrize("values", [1, 26, 10_000])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("declared", "true"), [(1, 1), (10, 30), (3000, 3300), (100, 500)])
def test_what_an_honest_client_sends_is_always_within(values: int, momentum: float, declared: int, true: int) -> None:
    run = private(momentum=momentum)
    most = largest_norm(run, {}, values, declared)

    norms = [simulated(run, values, declared, true, seed) for seed in range(50)]

    assert max(norms) < most
    if momentum == 0 and values > 1:
        assert max(norms) > most / 1000, "a bound that is no bound"


def test_the_bound_follows_the_runs_numbers() -> None:
    one = largest_norm(private(), {}, 10_000, 3000)

    assert one == pytest.approx(10 * 10 * 4.0 * 0.5 * (1 + (1 + 0.6 * 100) / 60))
    assert largest_norm(private(), {"learning_rate": 8.0}, 10_000, 3000) == pytest.approx(2 * one)
    assert largest_norm(private(head_learning_rate=8.0), {}, 10_000, 3000) == pytest.approx(2 * one)
    assert largest_norm(private(momentum=0.5), {}, 10_000, 3000) == pytest.approx(2 * one)
    assert largest_norm(private(proximal_mu=0.25), {}, 10_000, 3000) == pytest.approx(one)
    assert largest_norm(private(proximal_mu=0.75), {}, 10_000, 3000) == pytest.approx(2**10 * one)
    assert largest_norm(private(proximal_mu=1e4, steps=1000), {}, 10_000, 3000) == float("inf")
    assert largest_norm(private(optimizer="adam"), {}, 10_000, 1) == pytest.approx(10 * 10 * 7.3 * 4.0 * 100)
    assert largest_norm(config(), {}, 10_000, 0) == pytest.approx(10 * 0.1 * 1000)


def test_the_bound_grows_by_how_far_a_term_alone_moves() -> None:
    """Steps times rate times the term's length, which is known: not ten times that."""
    term = {"a": np.full((3, 4), 2.0, np.float32), "b": np.full(4, -2.0, np.float32)}
    one = largest_norm(private(), {}, 10_000, 3000)

    assert largest_norm(private(), {}, 10_000, 3000, term) == pytest.approx(one + 10 * 4.0 * 8.0)
    assert largest_norm(private(optimizer="adam"), {}, 10_000, 3000, term) == pytest.approx(
        largest_norm(private(optimizer="adam"), {}, 10_000, 3000)
    )


def test_the_bound_has_room_for_the_step_with_the_most_noise_of_a_round_with_bands() -> None:
    run = private()
    bands = run.model_copy(update={"privacy": run.privacy.model_copy(update={"noise_bands": 4})})
    widest = np.linalg.norm(np.linalg.inv(Banded(10, 4).dense()), axis=1).max()

    found = largest_norm(bands, {}, 10_000, 3000)

    assert found == pytest.approx(10 * 10 * 4.0 * 0.5 * (1 + (1 + 0.6 * 100 * widest) / 60), rel=1e-4)


@pytest.mark.parametrize("name", ["sentiment", "newsgroups", "images", "instruct", "findings"])
def test_the_examples_have_a_bound_that_means_something(name: str, request: pytest.FixtureRequest) -> None:
    run = load_run(request.config.rootpath / "examples" / f"{name}.toml", ("privacy.noise_multiplier=0.6",))

    assert 1 < largest_norm(run, {}, 300_000, 1000) < 1e5
