"""The frozen probe beside an adapter: the same federation with the same privacy, and the head alone is trained."""

import json
import re
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.models.load import load_model
from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from fedloom.simulation.probe import probe_of
from fedloom.simulation.simulate import simulate


@pytest.fixture
def config(tiny_base: Path, data: Path) -> RunConfig:
    """Two clients, one private round."""
    return RunConfig.model_validate(
        {
            "run": {"name": "both", "rounds": 1, "seed": 3},
            "model": {"base": str(tiny_base), "labels": ["negative", "positive"], "max_length": 16},
            "adapter": {"rank": 2, "alpha": 4, "layers": [1]},
            "train": {"steps": 2, "sampling_rate": 0.5, "learning_rate": 0.2, "head_learning_rate": 0.3},
            "privacy": {"epsilon": 20.0, "delta": 1e-2},
            "strategy": {"name": "ffa", "weighting": "examples", "options": {"orthonormal": True}},
            "data": {"source": str(data), "clients": 2},
            "engine": {"threads": 1},
        }
    )


@pytest.fixture
def run_file(config: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    return path


def test_it_differs_from_the_run_in_what_is_trained_alone(config: RunConfig) -> None:
    probe = probe_of(config, 8.0)

    mine, theirs = config.model_dump(), probe.model_dump()
    assert {name for name in mine if mine[name] != theirs[name]} == {"run", "adapter", "train", "strategy"}
    assert mine["run"] | {"name": "both-probe"} == theirs["run"]
    assert mine["train"] | {"head_learning_rate": 8.0} == theirs["train"]
    assert (probe.adapter.kind, probe.strategy.name, probe.strategy.options) == ("head", "fedavg", {})
    assert probe.strategy.weighting == config.strategy.weighting


def test_it_trains_no_value_of_the_base_model(config: RunConfig) -> None:
    probe = probe_of(config, 8.0)
    head = load_model(config.model, config.adapter).head

    schema = load_model(probe.model, probe.adapter).schema

    assert {tensor.module.rpartition(".")[2] for tensor in schema.tensors} == {"classifier"} == set(head.modules)


def test_it_spends_what_the_run_spends_on_the_same_rows(config: RunConfig, tmp_path: Path) -> None:
    adapter, probe = (simulate(each, tmp_path / "runs") for each in (config, probe_of(config, 8.0)))

    assert probe.epsilon == adapter.epsilon
    assert probe.final.examples == adapter.final.examples
    assert probe.final.accuracy == json.loads((probe.folder / "summary.json").read_text())["accuracy"]


def test_a_frozen_head_is_trained_in_the_probe(config: RunConfig) -> None:
    frozen = config.model_copy(update={"model": config.model.model_copy(update={"head": "frozen"})})

    assert probe_of(frozen, 8.0).model.head == "train"


def test_the_longest_name_has_room_for_its_end(config: RunConfig) -> None:
    long = config.model_copy(update={"run": config.run.model_copy(update={"name": "n" * 64})})

    assert RunConfig.model_validate(probe_of(long, 1.0).model_dump()).run.name == "n" * 58 + "-probe"


def test_a_task_without_a_head_is_refused(config: RunConfig) -> None:
    model = config.model.model_copy(update={"task": "causal-lm", "labels": (), "head": "frozen"})

    with pytest.raises(ConfigError, match="causal-lm adds no head, so there is no probe to train; leave out --probe"):
        probe_of(config.model_copy(update={"model": model}), 1.0)


def test_the_command_shows_the_best_of_several_beside_the_adapter(run_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    done = CliRunner().invoke(app, ["simulate", str(run_file), "--out", str(runs), "--probe", "0.001", "--probe", "4"])

    assert done.exit_code == 0, done.output
    folders = {path.name for path in runs.iterdir()}
    assert folders == {"both", "both-probe", "both-probe-2"}
    found = {name: json.loads((runs / name / "summary.json").read_text()) for name in folders}
    rates = [load_run(runs / name / "run.toml").train.head_learning_rate for name in sorted(folders)]
    assert rates == [0.3, 0.001, 4.0]
    best = max(found["both-probe"]["accuracy"], found["both-probe-2"]["accuracy"])
    for name, accuracy in (("adapter", found["both"]["accuracy"]), ("probe", best)):
        spent = max(found["both"]["epsilon"].values())
        assert re.search(rf"^{name} \(.*\) +{accuracy:.1%} .* {spent:.2f} *$", done.output, re.M), done.output
    memory, cpu = found["both"]["peak_bytes"] / 2**20, found["both"]["cpu_seconds"]
    assert re.search(rf"^peak memory +{memory:,.0f} MiB *$", done.output, re.M), done.output
    assert re.search(rf"^time +\d+ s, {cpu:.0f} s of processor time in all *$", done.output, re.M), done.output
    gained = 100 * (found["both"]["accuracy"] - best)
    word = "better" if gained >= 0 else "worse"
    assert f"the adapter is {abs(gained):.1f} points {word}; probe in {runs}/both-probe" in done.output


def test_without_the_option_nothing_more_is_trained(run_file: Path, tmp_path: Path) -> None:
    run_file.write_text(re.sub(r"^learning_rate = 0.2$", "learning_rate = 2.0", run_file.read_text(), flags=re.M))
    done = CliRunner().invoke(app, ["simulate", str(run_file), "--out", str(tmp_path / "runs"), "--no-privacy"])

    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["both-no-privacy"]
    assert "frozen features" not in done.output
    assert "was chosen for clipped gradients" in " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.e2e
def test_the_example_of_notes_runs_in_small_with_a_probe_beside_it(tiny_base: Path, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "findings.toml"
    small = [f"model.base={tiny_base}", "run.rounds=1", "train.steps=1", "train.sampling_rate=0.1"]
    small += ["data.max_examples=200", "evaluation.max_examples=20", "privacy.noise_multiplier=1.0"]

    words = [word for each in small for word in ("--set", each)]
    done = CliRunner().invoke(app, ["simulate", str(example), "--out", str(tmp_path), "--probe", "8", *words])

    assert done.exit_code == 0, done.output
    for client, department in enumerate(("clinic", "discharge", "emergency", "radiology")):
        assert re.search(rf"client-{client}: \d+ examples {department}$", done.output, re.M)
    assert "probe (frozen features)" in done.output
    assert {path.name for path in tmp_path.iterdir()} >= {"findings", "findings-probe"}
    assert (tmp_path / "findings" / "adapter" / "adapter_model.safetensors").is_file()
