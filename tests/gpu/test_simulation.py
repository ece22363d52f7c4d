"""Whole federations on a CUDA device, held against the same on the CPU."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.eval.held_out import HeldOut
from fedloom.client.policy import load_policy
from fedloom.core.config.run import EngineSection, RunConfig
from fedloom.core.schema import Tensors
from fedloom.server.build import build_strategy
from fedloom.server.coordinator import Coordinator
from fedloom.server.storage.local import Store
from fedloom.simulation.federation import Federation, build, completed
from fedloom.simulation.in_process.engine import run_inprocess, standing_clock
from fedloom.simulation.simulate import Watcher, simulate
from fedloom.strategies.start import starting_adapter
from tests.support.engines import entropy_of, largest_difference
from tests.support.runs import tiny_run

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Two clients, two private rounds."""
    return tiny_run(
        tiny_base,
        privacy={"enabled": True, "epsilon": 20.0, "delta": 1e-2},
        strategy={"name": "fedsvd"},
        rounds={"min_clients": 2},
        data={"source": str(data), "clients": 2},
    )


def on(config: RunConfig, device: str, **engine: Any) -> RunConfig:
    section = EngineSection.model_validate({"threads": 1, "device": device, **engine})
    return config.model_copy(update={"engine": section})


def trained(config: RunConfig, folder: Path) -> Tensors:
    """The adapter after the run, whose noise is always the same."""
    federation = build(config, folder)
    seams = {name: partial(entropy_of, name) for name in federation.clients}
    schema = federation.model.schema
    with Store(folder / "state", durable=False) as store:
        coordinator = Coordinator(
            config,
            schema,
            build_strategy(config),
            store,
            starting=starting_adapter(schema, config.run.seed),
            clock=standing_clock,
            expect=2,
        )
        for _ in run_inprocess(federation, coordinator, entropy=seams):  # type: ignore[arg-type]
            pass
        assert federation.model.device.type == torch.device(config.engine.device).type
        return coordinator.state.adapter


@pytest.mark.parametrize("private", [True, False], ids=["private", "open"])
def test_two_rounds_give_the_adapter_of_the_cpu(device: str, config: RunConfig, tmp_path: Path, private: bool) -> None:
    privacy = config.privacy.model_copy(update={"enabled": private})
    settled = completed(config.model_copy(update={"privacy": privacy}))

    expected, found = (trained(on(settled, each), tmp_path / each) for each in ("cpu", device))

    # A gradient that differs in its last bit may fall on another step of the grid; a step is 2^-20 of the clip norm.
    assert largest_difference(expected, found) < 1e-3


@pytest.mark.parametrize("private", [True, False], ids=["private", "open"])
def test_one_pass_gives_the_adapter_of_turns(device: str, config: RunConfig, tmp_path: Path, private: bool) -> None:
    privacy = config.privacy.model_copy(update={"enabled": private})
    settled = completed(config.model_copy(update={"privacy": privacy}))

    expected, found = (trained(on(settled, device, one_pass=each), tmp_path / str(each)) for each in (False, True))

    assert largest_difference(expected, found) < 1e-3


@pytest.mark.parametrize("engine", ["inprocess", "grpc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_simulation_trains_scores_exports_and_loads_again(
    device: str, config: RunConfig, tmp_path: Path, engine: str, dtype: str
) -> None:
    seen: list[torch.device] = []

    def ready(federation: Federation, _folder: Path) -> None:
        seen.append(federation.model.device)

    there = on(config, "auto", kind=engine, dtype=dtype)
    result = simulate(there, tmp_path / "runs", Watcher(ready=ready))

    assert [each.type for each in seen] == [torch.device(device).type]
    assert result.agreement >= (0.995 if dtype == "float32" else 0.95)
    assert np.isfinite(result.final.loss)
    assert max(result.epsilon.values()) > 0
    if engine == "grpc":
        policies = [load_policy(result.folder / "clients" / name / "policy.toml") for name in result.epsilon]
        whole = torch.cuda.get_device_properties(0).total_memory >> 20
        assert all(each.compute.memory_mib is not None for each in policies)
        assert sum(each.compute.memory_mib or 0 for each in policies) < 2 / 3 * whole
    source = str(there.data.source if there.data else "")
    here, cpu = (HeldOut.load(on(there, each, dtype=dtype), source) for each in (device, "cpu"))
    assert here.model.device.type == torch.device(device).type
    assert here.score_start().loss == pytest.approx(cpu.score_start().loss, rel=1e-4 if dtype == "float32" else 0.05)
    assert here.score_exported(result.exported).loss == pytest.approx(result.final.loss, rel=1e-2)


def test_a_merged_result_has_the_bytes_of_the_cpu(device: str, config: RunConfig, tmp_path: Path) -> None:
    """Weights are folded in on the CPU wherever they were trained."""
    adapter = config.adapter.model_copy(update={"kind": "ia3"})
    strategy = config.strategy.model_copy(update={"name": "fedavg"})
    there = on(config.model_copy(update={"adapter": adapter, "strategy": strategy}), device, dtype="bfloat16")

    result = simulate(there, tmp_path / "runs")

    assert result.exported.name == "merged"
    assert result.agreement >= 0.995
