"""Runs of SCAFFOLD and FedDyn: which run files they fit, and what a coordinator does with single updates."""

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError, UpdateRejected
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.storage.local import Store
from fedloom.server.validate_config import check_config
from tests.server.conftest import Federation, config

BOTH = ("scaffold", "feddyn")


def run(name: str, length: int = 4, **sections: dict[str, object]) -> RunConfig:
    return config(length, strategy={"name": name}, **sections)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer": "adam"}, "train.optimizer = 'adam'.*set it to 'sgd'"),
        ({"optimizer": "spectrum"}, "train.optimizer = 'spectrum'.*set it to 'sgd'"),
        ({"momentum": 0.5}, "train.momentum = 0.5.*set it to 0.0"),
        ({"ema": 0.5}, "train.ema = 0.5.*set it to 0.0"),
        ({"proximal_mu": 0.1}, "train.proximal_mu = 0.1.*set it to 0.0"),
    ],
)
def test_control_variates_are_read_off_plain_steps_only(train: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said} or choose another strategy"):
        check_config(run("scaffold", train=train), build_strategy(run("scaffold", train=train)))

    check_config(run("feddyn", train=train), build_strategy(run("feddyn", train=train)))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"secure_aggregation": {"enabled": True}, "rounds": {"min_clients": 3}}, "needs every update by itself"),
        ({"rounds": {"mode": "buffered", "clients_per_round": 2}}, "cannot use changes made from an older state"),
        (
            {"user_level": {"enabled": True, "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "cohort": 3}},
            "does not declare the trait linear",
        ),
        ({"strategy": {"norm_bound": 1.0}}, "which a norm bound scales"),
    ],
    ids=["secure sums", "buffered rounds", "user-level privacy", "norm bound"],
)
def test_what_hides_ages_or_scales_single_updates_is_refused(
    name: str, sections: dict[str, dict[str, object]], said: str
) -> None:
    sections = {**sections, "strategy": {"name": name, **sections.get("strategy", {})}}
    with pytest.raises(ConfigError, match=said):
        check_config(config(2, **sections), build_strategy(config(2, **sections)))


@pytest.mark.parametrize("name", BOTH)
def test_a_private_run_weighs_its_clients_as_others_do(name: str) -> None:
    private = run(name, privacy={"noise_multiplier": 1.0, "epsilon": 8.0, "delta": 1e-5})

    assert calibrated(private).strategy.weighting == "examples"


@pytest.mark.parametrize("name", BOTH)
def test_who_sat_a_round_out_gets_the_term_of_its_last_one(name: str, store: Store) -> None:
    chosen = run(name, rounds={"clients_per_round": None, "deadline_s": 5.0})
    federation = Federation(store, chosen, build_strategy(chosen), expect=3)
    federation.begin("ann", "ben", "cat")
    assert federation.assignment("ann").linear == frozenset()
    for client in ("ann", "ben", "cat"):
        federation.send(*federation.update(client))
    (first,) = {federation.assignment("cat").linear}

    for client in ("ann", "ben"):
        federation.send(*federation.update(client))
    federation.now_s = 6.0
    federation.coordinator.tick()

    assert federation.coordinator.progress.round == 2
    assert first == federation.assignment("cat").linear != frozenset()
    memory = federation.coordinator.state.memory
    assert {key for key in memory if "/of/" in key} == {f"client_gradients/of/{each}" for each in ("ann", "ben", "cat")}


@pytest.mark.parametrize("name", BOTH)
def test_terms_of_a_hostile_client_are_carried_by_every_codec(name: str, store: Store) -> None:
    """A gradient of 1e30 would be beyond fp16 in the next broadcast, and no round could ever open again."""
    chosen = run(name, wire={"broadcast": "fp16"}, rounds={"max_update_norm": 1e30})
    federation = Federation(store, chosen, build_strategy(chosen), expect=3)
    federation.begin("ann", "ben", "cat")

    for index, client in enumerate(("ann", "ben", "cat")):
        try:
            federation.send(*federation.update(client, 60_000.0 if index == 0 else 0.01))
        except UpdateRejected:
            pytest.fail("the codec of broadcasts carries it")

    assert federation.coordinator.progress.round == 1
    largest = max(
        float(np.abs(each).max()) for key, each in federation.coordinator.state.memory.items() if "/of/" in key
    )
    assert largest == 50.0
    assert federation.assignment("ben").linear
