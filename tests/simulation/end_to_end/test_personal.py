"""A run in which each client keeps its head to itself: its accuracy is that of the clients' adapters, each exported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedloom.client.models.exports.loading import load_exported, predict
from fedloom.core.config.run import PrivacySection, RunConfig
from fedloom.core.schema import Role
from fedloom.simulation import simulate as module
from fedloom.simulation.federation import build, completed
from fedloom.simulation.simulate import simulate
from fedloom.strategies.api import Plan, State, Update
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.transforms.average import Sum, fold
from tests.support.runs import tiny_run


class Keeping(FedAvg):
    """Every client trains a head of its own."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        return replace(super().plan(state, round, client), personal=frozenset({Role.HEAD}))

    def fold(self, state: State, acc: Sum | None, update: Update) -> Sum:
        return fold(state.schema.select({Role.LORA_A, Role.LORA_B}), acc, update)


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    return tiny_run(
        tiny_base,
        data={"source": str(data), "clients": 3},
    )


def test_the_accuracy_is_that_of_the_clients_own_adapters_and_each_is_exported(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_strategy", lambda *_: Keeping())

    result = simulate(config, tmp_path / "runs")

    federation = build(completed(config), tmp_path / "again")
    folders = sorted((result.folder / "adapters").iterdir())
    assert [folder.name for folder in folders] == sorted(federation.clients)
    scores = {}
    for folder in folders:
        reloaded = load_exported(Path(config.model.base), folder, 2)
        said = predict(reloaded, federation.model.task, federation.held_out, federation.model.tokenizer.pad_token_id)
        scores[folder.name] = float(np.mean(said == federation.held_out.labels))
        assert json.loads((folder / "fedloom.json").read_text())["held_out_accuracy"] == scores[folder.name]
    heads = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert any(not np.array_equal(heads[0][name], heads[1][name]) for name in heads[0] if "classifier" in name)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["accuracy_by_client"] == scores
    assert result.final.accuracy == pytest.approx(np.mean(list(scores.values())))
    assert result.records[-1].accuracy == result.final.accuracy


def test_a_run_that_keeps_nothing_has_one_adapter(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(config, tmp_path / "runs")

    assert not (result.folder / "adapters").exists()
    assert json.loads((result.folder / "summary.json").read_text())["accuracy_by_client"] == {}


def test_in_a_private_run_of_two_pairs_each_client_ends_with_a_model_of_its_own(
    config: RunConfig, tmp_path: Path
) -> None:
    """The own pairs differ and are in no broadcast; what is exported for a client predicts what was scored for it."""
    sections = {
        "adapter": config.adapter.model_copy(update={"kind": "dual-lora"}),
        "strategy": config.strategy.model_copy(update={"name": "feddpa"}),
        "privacy": PrivacySection(epsilon=50.0, delta=1e-2),
    }
    run = config.model_copy(update=sections)

    result = simulate(run, tmp_path / "runs")

    federation = build(completed(run), tmp_path / "again")
    folders = sorted((result.folder / "merged-by-client").iterdir())
    assert [folder.name for folder in folders] == sorted(federation.clients)
    trained = [load_file(folder / "adapter.safetensors") for folder in folders]
    shared, own = (sorted(federation.model.schema.names(role)) for role in ("shared", "own"))
    assert all(np.array_equal(trained[0][name], trained[1][name]) for name in shared)
    assert all(not np.array_equal(trained[0][name], trained[1][name]) for name in own)
    whole = load_file(result.folder / "merged" / "adapter.safetensors")
    begun = starting_adapter(federation.model.schema, run.run.seed)
    assert all(np.array_equal(whole[name], begun[name]) for name in own), "the own pairs stay with their clients"
    for folder in folders:
        reloaded = load_exported(Path(config.model.base), folder, 2)
        said = predict(reloaded, federation.model.task, federation.held_out, federation.model.tokenizer.pad_token_id)
        score = float(np.mean(said == federation.held_out.labels))
        assert json.loads((folder / "fedloom.json").read_text())["held_out_accuracy"] == score
