"""A federation with noise from the coordinator, from the run file to the reports."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.server.privacy.user_ledger import spent
from fedloom.simulation.federation import completed
from fedloom.simulation.simulate import simulate
from tests.support.runs import tiny_run


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Three clients and two rounds, private both ways."""
    return tiny_run(
        tiny_base,
        train={"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.3},
        privacy={"epsilon": 20.0, "delta": 1e-2},
        strategy={"name": "ffa"},
        user_level={"enabled": True, "epsilon": 6.0, "delta": 1e-3, "clip_norm": 0.1, "cohort": 3},
        rounds={"min_clients": 3},
        data={"source": str(data), "clients": 3},
    )


def changed(config: RunConfig, **keys: object) -> RunConfig:
    return config.model_copy(update={"user_level": config.user_level.model_copy(update=keys)})


def test_both_guarantees_are_reported_and_never_in_one_figure(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(config, tmp_path / "runs")

    user = completed(config).user_level
    assert result.user_epsilon == spent(user, 2) <= 6.0
    assert result.user_epsilon not in result.epsilon.values()
    assert [record.user_epsilon for record in read_metrics(result.folder)] == [None, spent(user, 1), spent(user, 2)]
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["user_epsilon"] == result.user_epsilon
    assert summary["epsilon"] == result.epsilon
    known = json.loads((result.folder / "adapter" / "fedloom.json").read_text())
    assert known["privacy"]["unit"] == "one example"
    assert known["user_privacy"]["unit"] == "one client"
    assert known["user_privacy"]["epsilon"] == result.user_epsilon
    assert known["privacy"]["epsilon"] == pytest.approx(max(result.epsilon.values()))


def test_a_run_without_it_says_so(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(changed(config, enabled=False), tmp_path / "runs")

    assert result.user_epsilon is None
    assert json.loads((result.folder / "adapter" / "fedloom.json").read_text())["user_privacy"] is None
    assert all(record.user_epsilon is None for record in read_metrics(result.folder))


@pytest.mark.parametrize("mechanism", ["gaussian", "tree"])
def test_the_coordinators_noise_is_in_the_exported_adapter(config: RunConfig, tmp_path: Path, mechanism: str) -> None:
    """Two open runs of one seed differ by this noise alone, in size as accounted: 128 values of each B and a head."""
    open_run = config.model_copy(update={"privacy": config.privacy.model_copy(update={"enabled": False})})
    loud = changed(open_run, noise_multiplier=5.0, clip_norm=1e-2, epsilon=100.0, mechanism=mechanism)

    ends = [
        load_file(simulate(loud, tmp_path / "runs").folder / "adapter" / "adapter_model.safetensors") for _ in range(2)
    ]

    noise = np.concatenate([(ends[0][n] - ends[1][n]).ravel() for n in ends[0] if "lora_B" in n])
    # After two rounds fresh noise has added up twice, the tree's once; the difference of two runs doubles it.
    single = 5.0 * 1e-2 / 3 * np.sqrt(2)
    expected = single * (np.sqrt(2) if mechanism == "gaussian" else 1.0)
    assert noise.size >= 500
    assert noise.std() == pytest.approx(expected, rel=0.15)


def test_a_run_that_could_strand_is_refused_before_it_starts(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few for 2 rounds"):
        simulate(changed(config, max_participations=1), tmp_path / "runs")
