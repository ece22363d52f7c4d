"""Loading, a private round and its memory on a CUDA device, held against the same on the CPU."""

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from fedloom.client.benchmarks.gpu import clipped_sum_error
from fedloom.client.data.rows import Rows
from fedloom.client.doctor.plan import plan_memory
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy, Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.device import prepare_device, shared
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import AdapterSection, ModelSection, Spec
from fedloom.core.schema import Array
from tests.client.rounds import assignment, start

pytestmark = pytest.mark.gpu
LORA = AdapterSection(rank=4, alpha=8)
QUANTIZED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def wide(tiny_base: Path, model_section: ModelSection, tmp_path: Path) -> ModelSection:
    """Layers of 128 values in a row: bitsandbytes packs blocks of 64."""
    folder = shutil.copytree(tiny_base, tmp_path / "wide")
    config = BertConfig.from_pretrained(folder, hidden_size=128, intermediate_size=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BertModel(config).save_pretrained(folder)
    return model_section.model_copy(update={"base": str(folder)})


def trained(section: ModelSection, compute: ComputePolicy, rows: Rows, spec: Spec, policy: Policy, home: Path) -> Any:
    """What a private round changes, with noise that is always the same."""
    model = load_model(section, LORA, compute)
    policy, spec = policy.model_copy(update={"compute": compute}), spec.model_copy(update={"model": section})
    home.mkdir()
    with Ledger(home, "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(model, rows, spec, policy, ledger, entropy_for=lambda _: Seeded(7))
        delta = trainer.train("run", assignment(), start(model)).delta
    assert model.probed
    assert next(model.model.parameters()).device.type == torch.device(compute.device).type
    return delta


def flat(delta: dict[str, Array]) -> Array:
    return np.concatenate([value.ravel() for value in delta.values()])


@pytest.mark.parametrize("size", ["encoder tiny", "decoder tiny"])
def test_the_clipped_sum_is_that_of_float64(device: str, size: str) -> None:
    assert clipped_sum_error(size, torch.device(device)) < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*", "ignore::FutureWarning:bitsandbytes.*")
@pytest.mark.parametrize(
    ("keys", "cosine"),
    [
        ({}, 0.99999),
        ({"gradient_checkpointing": True}, 0.99999),
        ({"activation_cache_mib": 0}, 0.99999),
        ({"dtype": "bfloat16"}, 0.98),
        ({"quantization": "8bit"}, 0.97),
        ({"dtype": "bfloat16", "quantization": "4bit"}, 0.8),
    ],
    ids=str,
)
def test_a_private_round_is_that_of_the_cpu(
    device: str,
    keys: dict[str, Any],
    cosine: float,
    wide: ModelSection,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
) -> None:
    if "quantization" in keys and not QUANTIZED:
        pytest.skip("needs fedloom[quantized]")
    here = ComputePolicy.model_validate({"device": device, **keys})

    expected = flat(trained(wide, ComputePolicy(device="cpu"), rows, spec, policy, tmp_path / "cpu"))
    found = flat(trained(wide, here, rows, spec, policy, tmp_path / "gpu"))

    assert expected @ found > cosine * np.linalg.norm(expected) * np.linalg.norm(found)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(expected), rel=0.2)


def test_a_plan_is_what_the_device_then_holds(device: str, wide: ModelSection, spec: Spec) -> None:
    compute = ComputePolicy(device=device)
    planned = plan_memory(spec.model_copy(update={"model": wide}), compute)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_model(wide, LORA, compute)
    found = torch.cuda.memory_allocated() - before

    # The allocator gives out multiples of 512 bytes, and each of these tensors is small.
    spare = 512 * len(list(model.model.parameters()))
    assert abs(found - sum(part.bytes for part in planned.parts[:2])) < spare + 0.02 * found


def test_a_process_keeps_to_its_part(device: str) -> None:
    part = shared(ComputePolicy(device=device), 4).memory_mib
    assert part is not None
    load = ComputePolicy(device=device, memory_mib=part)
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        prepare_device(load)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(whole // 3, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()
