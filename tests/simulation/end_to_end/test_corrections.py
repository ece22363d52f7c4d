"""A strategy that moves what was learnt into the frozen weights: one model is scored, sent and exported everywhere."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.client.eval.held_out import HeldOut
from fedloom.core.config.run import RunConfig
from fedloom.core.errors import StrategyError
from fedloom.core.schema import LORA, Role, Schema, Tensors
from fedloom.server import build as launch
from fedloom.server.monitoring.recorders.api import read_metrics
from fedloom.server.storage.verify import newest_state
from fedloom.simulation.federation import completed
from fedloom.simulation.simulate import simulate
from fedloom.strategies.api import Plan, State, Strategy, Traits, Update
from fedloom.strategies.conformance import StrategyConformance
from fedloom.strategies.lowrank import refactorize
from fedloom.strategies.start import starting_adapter
from fedloom.strategies.state import state_from_bytes
from fedloom.strategies.transforms.average import Sum, begin, fold, mean
from tests.support.runs import tiny_run

pytestmark = pytest.mark.usefixtures("preloaded_clients")

Acc = tuple[Sum, tuple[Update, ...]]


@dataclass(frozen=True)
class FLoRA(Strategy):
    """FLoRA (arXiv 2409.05976): the stack of all products goes into the frozen weight, and pairs begin anew."""

    traits: ClassVar[Traits] = Traits(keeps_updates=True, rewrites=True)
    hidden: bool = False
    """Keep the correction under names that nobody knows, and say nothing of it."""

    def init(self, schema: Schema, adapter: Tensors, seed: int) -> State:
        return begin(schema, adapter, seed)

    def plan(self, state: State, round: int, client: str) -> Plan:
        known = {name.removeprefix("hidden "): each for name, each in state.memory.items()}
        return Plan(train=LORA | ({Role.HEAD} & state.schema.roles), broadcast={**state.adapter, **known})

    def fold(self, state: State, acc: Acc | None, update: Update) -> Acc:
        total, kept = acc or (None, ())
        return fold(state.schema, total, update), (*kept, update)

    def commit(self, state: State, acc: Acc) -> State:
        total, kept = acc
        change, fresh = mean(total), starting_adapter(state.schema, state.seed + state.round + 1)
        adapter = {name: (each + change[name]).astype(np.float32) for name, each in state.adapter.items()}
        factors = {}
        for pair in state.schema.pairs:
            b = np.concatenate([u.weight / total.weight * u.value(pair.b) for u in kept], axis=1)
            a = np.concatenate([u.value(pair.a) for u in kept])
            old = self._name(pair.module)
            if f"{old}.base_A" in state.memory:
                b = np.concatenate([state.memory[f"{old}.base_B"], b], axis=1)
                a = np.concatenate([state.memory[f"{old}.base_A"], a])
            factors[old] = refactorize(b, a)
            adapter[pair.a], adapter[pair.b] = fresh[pair.a], fresh[pair.b]
        rank = max(min(b.shape[0], *a.shape) for b, a in factors.values())
        memory = {}
        for name, (b, a) in factors.items():
            width = max(0, rank - len(a))
            memory[f"{name}.base_A"] = np.pad(a, ((0, width), (0, 0)))[:rank].astype(np.float32)
            memory[f"{name}.base_B"] = np.pad(b, ((0, 0), (0, width)))[:, :rank].astype(np.float32)
        return replace(state, adapter=adapter, memory=memory, round=state.round + 1)

    def _name(self, module: str) -> str:
        return f"hidden {module}" if self.hidden else module


class TestFLoRA(StrategyConformance):
    def strategy(self) -> FLoRA:
        return FLoRA()


@pytest.fixture
def flora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run file's strategy be FLoRA, as if its package were installed."""
    monkeypatch.setattr(launch, "build", lambda group, name, options: FLoRA())


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
    """The command line in this process, where FLoRA is known."""

    def command(*words: str | Path) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return command


def test_metrics_export_and_state_are_one_model_on_every_engine(
    flora: None, config: RunConfig, tmp_path: Path, fedloom: Any
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
    monkeypatch.setattr(launch, "build", lambda group, name, options: FLoRA(hidden=True))

    with pytest.raises(
        StrategyError, match=r"'flora' sends clients the correction .* not in its result.*result\(state\)"
    ):
        simulate(config, tmp_path / "out")
