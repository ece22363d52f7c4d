"""The run files in examples/: each is one that a coordinator takes, with the data that lie beside it."""

from pathlib import Path

import pytest

from fedloom.client.data.load import load_rows
from fedloom.core.config.run import load_run
from fedloom.server.build import build_strategy, calibrated
from fedloom.server.validate_config import check_config
from fedloom.simulation.federation import shares

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
WITH_DATA = [path for path in EXAMPLES if path.with_suffix("").is_dir()]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
    assert WITH_DATA


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_coordinator_takes_it(path: Path) -> None:
    config = load_run(path)

    check_config(config, build_strategy(config))

    assert config.run.name == path.stem
    assert config.data is not None
    assert config.data.clients >= config.rounds.min_clients
    assert calibrated(config).privacy.noise_multiplier


@pytest.mark.parametrize("path", WITH_DATA, ids=lambda path: path.stem)
def test_its_data_are_split_and_held_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(path)
    assert config.data is not None

    clients = shares(config, config.data)
    held_out = load_rows(config.data.source, config.model.labels, "test", config.model.task, config.data)

    trained = [text for rows in clients.values() for text in rows.texts]
    assert len(clients) == config.data.clients
    assert len(set(trained)) == len(trained), "a row that is there twice is protected once"
    assert not set(trained) & set(held_out.texts)
    assert all(config.privacy.delta < 1 / len(rows) for rows in clients.values())
    assert sum(file.stat().st_size for file in path.with_suffix("").iterdir()) < 300_000
