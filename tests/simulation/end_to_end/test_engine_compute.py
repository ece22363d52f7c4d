"""[engine] of a run file: where a simulation computes, and in what precision, with either engine."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from fedloom.client.eval.held_out import HeldOut
from fedloom.client.policy import ComputePolicy, load_policy
from fedloom.core.config.run import EngineSection, RunConfig
from fedloom.core.schema import Schema
from fedloom.server.rounds.run_log import agreed
from fedloom.simulation.federation import Federation
from fedloom.simulation.simulate import Watcher, simulate
from tests.support.cuda import pretend_cuda
from tests.support.runs import tiny_run

pytestmark = pytest.mark.usefixtures("preloaded_clients")
QUANTIZED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def config(data: Path, tiny_base: Path) -> RunConfig:
    """Two clients, two private rounds."""
    return tiny_run(
        tiny_base,
        privacy={"enabled": True, "epsilon": 20.0, "delta": 1e-2},
        rounds={"min_clients": 2},
        data={"source": str(data), "clients": 2},
        engine={"threads": 1, "device": "cpu"},
    )


def on(config: RunConfig, **engine: object) -> RunConfig:
    section = EngineSection.model_validate({**config.engine.model_dump(), **engine})
    return config.model_copy(update={"engine": section})


def test_clients_are_told_nothing_of_the_engine(config: RunConfig) -> None:
    schema = Schema(())
    lean = on(config, kind="grpc", dtype="bfloat16", quantization="4bit", memory_mib=100)

    assert agreed(lean, schema) == agreed(config, schema)
    assert lean.spec == config.spec


@pytest.mark.parametrize("adapter", ["lora", "ia3", "bottleneck"])
def test_a_run_in_bfloat16_leaves_what_it_has_trained(config: RunConfig, tmp_path: Path, adapter: str) -> None:
    kinds: list[set[torch.dtype]] = []

    def ready(federation: Federation, _folder: Path) -> None:
        kinds.append({each.dtype for each in federation.model.model.parameters()})

    section = config.adapter.model_copy(update={"kind": adapter})
    lean = on(config, dtype="bfloat16").model_copy(update={"adapter": section})
    result = simulate(lean, tmp_path / "runs", Watcher(ready=ready))

    assert torch.bfloat16 in kinds[0]
    assert result.agreement >= 0.95
    again = HeldOut.load(lean, str(lean.data.source if lean.data else ""))
    assert next(again.model.model.parameters()).dtype == torch.bfloat16
    assert again.score_exported(result.exported).accuracy == pytest.approx(result.final.accuracy, abs=0.11)


@pytest.mark.skipif(not QUANTIZED, reason="needs fedloom[quantized]")
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*", "ignore::FutureWarning:bitsandbytes.*")
def test_a_run_on_eight_bits_leaves_an_adapter(config: RunConfig, tmp_path: Path) -> None:
    result = simulate(on(config, quantization="8bit"), tmp_path / "runs")

    assert result.agreement >= 0.95
    assert max(result.epsilon.values()) > 0


def test_clients_in_processes_compute_as_the_engine_says(config: RunConfig, tmp_path: Path) -> None:
    lean = on(config, kind="grpc", dtype="bfloat16", gradient_checkpointing=True, activation_cache_mib=0)
    result = simulate(lean, tmp_path / "runs")

    for name in ("client-0", "client-1"):
        policy = load_policy(result.folder / "clients" / name / "policy.toml")
        assert policy.compute == ComputePolicy.of(lean.engine)
    assert result.agreement >= 0.95
    assert json.loads((result.folder / "summary.json").read_text())["epsilon"].keys() == {"client-0", "client-1"}


def test_processes_on_one_gpu_get_a_part_of_it_each(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they are started with: nobody here can run on it."""
    started: list[dict[str, str]] = []

    class Stopped(Exception):
        pass

    def popen(*_: object, env: dict[str, str], **__: object) -> None:
        started.append(env)
        raise Stopped

    def ready(federation: Federation, _folder: Path) -> None:
        pretend_cuda(monkeypatch, 12 << 30)
        for name, policy in federation.policies.items():
            compute = policy.compute.model_copy(update={"device": "cuda"})
            federation.policies[name] = policy.model_copy(update={"compute": compute})

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with pytest.raises(Stopped):
        simulate(on(config, kind="grpc"), tmp_path / "runs", Watcher(ready=ready))

    assert started[0]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    policy = load_policy(tmp_path / "runs" / "tiny" / "clients" / "client-0" / "policy.toml")
    assert policy.compute.device == "cuda"
    assert 3 << 10 < (policy.compute.memory_mib or 0) < 4 << 10  # a third is this process's own
