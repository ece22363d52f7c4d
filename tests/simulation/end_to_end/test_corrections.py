"""A strategy that moves what was learnt into the frozen weights: one model is scored, sent and exported everywhere."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.eval.held_out import HeldOut
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import StrategyError
from fedloom.server import build as launch
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.server.storage.verify import newest_state
from fedloom.simulation.federation import completed
from fedloom.simulation.simulate import simulate
from fedloom.strategies.api import Plan, State
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.stacking.stack import Kept
from fedloom.strategies.state import state_from_bytes
from tests.support.runs import tiny_run

pytestmark = pytest.mark.usefixtures("preloaded_clients")


@dataclass(frozen=True)
class Hiding(FLoRA):
    """Keeps the correction under names that nobody knows, and says nothing of it."""

    def plan(self, state: State, round: int, client: str) -> Plan:
        known = {name.removeprefix("hidden "): each for name, each in state.memory.items()}
        return super().plan(replace(state, memory=known), round, client)

    def commit(self, state: State, acc: Kept | None) -> State:
        known = {name.removeprefix("hidden "): each for name, each in state.memory.items()}
        after = super().commit(replace(state, memory=known), acc)
        return replace(after, memory={f"hidden {name}": each for name, each in after.memory.items()})


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Two clients, two rounds, not private."""
    return tiny_run(
        tiny_base,
        strategy={"name": "flora"},
        rounds={"min_clients": 2},
        data={"source": str(data), "clients": 2},
    )


@pytest.fixture
def fedloom() -> Any:
    """The command line in this process."""

    def command(*words: str | Path) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return command


def test_metrics_export_and_state_are_one_model_on_every_engine(
    config: RunConfig, tmp_path: Path, fedloom: Any
) -> None:
    losses = []
    for engine in ("inprocess", "grpc"):
        folder = tmp_path / engine
        kind = config.engine.model_copy(update={"kind": engine})
        found = simulate(config.model_copy(update={"engine": kind}), folder)
        run = found.folder / "run.toml"
        state = found.folder / "state"
        known = completed(config)

        held_out = HeldOut.load(known, known.data.source)  # type: ignore[union-attr]
        reached = state_from_bytes(newest_state(state, known), held_out.model.schema)
        truth = held_out.score(FLoRA().result(reached)).loss
        without = held_out.score(reached.adapter).loss

        assert abs(truth - without) > 1e-3  # the correction is most of what was learnt
        assert found.final.loss == pytest.approx(truth, abs=1e-6)
        assert read_metrics(found.folder)[-1].loss == pytest.approx(truth, abs=1e-6)
        assert held_out.score_exported(found.folder / "adapter").loss == pytest.approx(truth, abs=1e-5)
        fedloom("export", run, "--state", state, "--out", folder / "peft")
        assert held_out.score_exported(folder / "peft").loss == pytest.approx(truth, abs=1e-5)
        fedloom("export", run, "--state", state, "--format", "safetensors", "--out", folder / "plain")
        assert held_out.score(load_file(folder / "plain")).loss == pytest.approx(truth, abs=1e-6)
        scored = json.loads(fedloom("evaluate", run, "--state", state, "--json"))
        assert scored["now"]["loss"] == pytest.approx(truth, abs=1e-6)
        assert found.agreement == 1.0
        losses.append([record.loss for record in read_metrics(found.folder)])

    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_correction_that_its_result_does_not_hold_ends_the_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "build", lambda group, name, options: Hiding())

    with pytest.raises(
        StrategyError, match=r"'flora' sends clients the correction .* not in its result.*result\(state\)"
    ):
        simulate(config, tmp_path / "out")
