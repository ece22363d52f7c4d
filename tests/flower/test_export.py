"""What `fedloom flower export` writes, and what a launch makes of it."""

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.policy import load_policy
from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError
from fedloom.flower.launch import launch
from fedloom.server.build import calibrated
from fedloom.server.prepared_schema import prepared_path
from tests.flower.federation import write_run
from tests.flower.test_rounds import Sites


@pytest.fixture
def run_file(tmp_path: Path, tiny_base: Path) -> Path:
    return write_run(tmp_path, tiny_base, clients=2)


def export(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["flower", "export", *map(str, arguments)], catch_exceptions=False)
    return done.output if done.exit_code == 0 else pytest.fail(done.output)


def test_an_app_is_the_run_and_no_code(run_file: Path, tmp_path: Path) -> None:
    export(tmp_path / "app", "--run", run_file, "--set", "privacy.enabled=true", "--set", "run.rounds=3")

    assert {path.name for path in (tmp_path / "app").iterdir()} == {
        *("README.md", "pyproject.toml", "run.schema.json", "run.toml")
    }
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    assert project["project"]["name"] == "tiny"
    assert project["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "fedloom.flower.server_app:app",
        "clientapp": "fedloom.flower.client_app:app",
    }
    config = load_run(tmp_path / "app" / "run.toml")
    assert config.model.digest is not None
    assert config.privacy.noise_multiplier is not None, "or two launches would not be the same run"
    assert config == calibrated(config)
    assert config.run.rounds == 3
    assert prepared_path(tmp_path / "app" / "run.toml").exists()


def test_made_up_clients_get_policies_that_a_node_can_load(run_file: Path, tmp_path: Path) -> None:
    said = export(tmp_path / "app", "--run", run_file, "--clients", tmp_path / "c")

    for name in ("client-0", "client-1"):
        policy = load_policy(tmp_path / "c" / name / "policy.toml")
        assert policy.client.name == name
        assert Path(policy.data.source).is_file()
        assert policy.client.state == tmp_path / "c" / name
        assert str(tmp_path / "c" / name / "policy.toml") in said


def test_a_folder_with_something_in_it_is_not_written_over(run_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        export(tmp_path, "--run", run_file)


def test_secure_sums_are_refused_with_the_way_out(run_file: Path, tmp_path: Path) -> None:
    secure = ("--set", "secure_aggregation.enabled=true", "--set", "strategy.weighting=uniform")
    export(tmp_path / "app", "--run", run_file, *secure)

    with pytest.raises(ConfigError, match="fedloom server"):
        launch(tmp_path / "app" / "run.toml", tmp_path / "runs", Sites({}))

    assert not (tmp_path / "runs").exists()
