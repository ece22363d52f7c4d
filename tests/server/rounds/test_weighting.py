"""What is settled before a run: who counts how much, and how many rounds the noise has to pay for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedloom.core.config.run import RunConfig
from fedloom.core.privacy.spends import faint
from fedloom.server import build as module
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.storage.local import Store
from fedloom.server.validate_config import check_config

PRIVATE = {"privacy": {"noise_multiplier": 1.0}}
COHORT = {"clients_per_round": 4, "min_clients": 4}
USER = {"enabled": True, "epsilon": 50, "delta": 1e-3, "clip_norm": 1.0, "cohort": 4}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "private": (PRIVATE, "examples"),
    "private by choice": (PRIVATE | {"strategy": {"weighting": "uniform"}}, "uniform"),
    "open": ({"privacy": {"enabled": False}}, "uniform"),
    "open by choice": ({"privacy": {"enabled": False}, "strategy": {"weighting": "examples"}}, "examples"),
    "secure": (PRIVATE | {"secure_aggregation": {"enabled": True}, "rounds": {"min_clients": 3}}, "uniform"),
    "robust": (PRIVATE | {"strategy": {"name": "median"}, "rounds": {"min_clients": 3}}, "uniform"),
    "user-level": ({"privacy": {"enabled": False}, "user_level": USER, "rounds": COHORT}, "uniform"),
    "unknown here": (PRIVATE | {"strategy": {"name": "nowhere-installed"}}, "examples"),
}


@pytest.mark.parametrize(("sections", "weighting"), CASES.values(), ids=CASES)
def test_weights_that_are_left_open_are_settled(
    configure: Callable[..., RunConfig], sections: dict[str, Any], weighting: str
) -> None:
    config = calibrated(configure(**sections))

    assert config.strategy.weighting == weighting
    assert calibrated(config) == config
    if config.strategy.name != "nowhere-installed":
        check_config(config, build_strategy(config))


def test_a_tiny_site_moves_a_private_run_by_its_share(
    store: Store, federate: Any, configure: Callable[..., RunConfig]
) -> None:
    """Three sites of 600, 600 and 5 rows: the noise of the last is 120 times that of the others, its weight 1/120."""
    config = calibrated(configure(1, rounds={"min_clients": 3}, **PRIVATE))
    federation = federate(store, config, build_strategy(config))
    sizes = {"ada": 600, "bo": 600, "cy": 5}
    for name, size in sizes.items():
        federation.join(name, examples=size)
    before = {name: tensor.copy() for name, tensor in federation.coordinator.state.adapter.items()}
    for name in sizes:
        federation.work(name)
    for name in sizes:
        federation.send(*federation.update(name, 0.5 if name == "cy" else 0.0))

    for name, tensor in federation.coordinator.state.adapter.items():
        np.testing.assert_allclose(tensor - before[name], 0.5 * 5 / 1205, rtol=1e-3)


def test_a_site_whose_noise_drowns_its_news_is_named(configure: Callable[..., RunConfig]) -> None:
    spec = configure(train={"steps": 1, "sampling_rate": 0.2, "learning_rate": 0.1}, **PRIVATE).spec

    assert faint(spec, 600) is None
    assert faint(spec, 25) is None
    text = faint(spec, 5)
    assert text is not None
    assert "1.0 of 5 declared examples" in text
    assert "25 examples or more count" in text
    open_run = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})
    assert faint(open_run, 5) is None


@pytest.mark.parametrize(("spare", "steps"), [(0, 30), (1, 33)])
def test_the_noise_pays_for_spare_rounds(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, spare: int, steps: int
) -> None:
    """A client that was killed once in ten rounds pays for eleven, within the same epsilon."""
    asked: list[tuple[object, ...]] = []

    def noted(*args: object, **_: object) -> float:
        asked.append(args)
        return 1.5

    monkeypatch.setattr(module, "calibrate", noted)
    sections = {"train": {"steps": 3, "sampling_rate": 0.05}, "rounds": {"spare_rounds": spare}}

    config = calibrated(configure(10, privacy={"epsilon": 6.0, "delta": 1e-5}, **sections))

    assert asked == [(6.0, 1e-5, 0.05, steps)]
    assert config.privacy.noise_multiplier == 1.5
