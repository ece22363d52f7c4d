"""What `fedloom bench dp-step` measures of a step's memory is what `fedloom doctor --plan` says of it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from fedloom.client.assets.fetch import fetch
from fedloom.client.benchmarks import step
from fedloom.client.benchmarks.step import peak_bytes
from fedloom.client.doctor.plan import plan_memory
from fedloom.client.policy import ComputePolicy
from fedloom.core.config.run import AdapterSection, ModelSection, Spec


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell a process's peak")
@pytest.mark.parametrize("variant", ["plain", "ours"])
def test_the_peak_of_a_step_is_near_its_plan(variant: str) -> None:
    fetch("minilm-l6")
    spec = Spec.model_validate(
        {
            "run": {"name": "peak", "rounds": 1},
            "model": ModelSection(base="minilm-l6", labels=("a", "b"), max_length=step.LENGTH),
            "adapter": AdapterSection(rank=8, targets=("query", "key", "value", "dense")),
            "train": {"steps": 1, "sampling_rate": 0.1, "learning_rate": 1.0, "microbatch": step.BATCH},
            "privacy": {"enabled": variant == "ours", "noise_multiplier": 1.0},
        }
    )
    parts = plan_memory(spec, ComputePolicy(device="cpu", memory_mib=1 << 16)).parts
    planned = sum(part.bytes for part in parts if part.name.startswith(("activations of 32", "gradient")))

    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        found = fresh.submit(peak_bytes, variant).result()

    assert 0.5 * planned < found < 2 * planned
