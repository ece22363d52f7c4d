"""EVA (Paischer et al., 2024): what PEFT makes of public rows is an adapter that a run begins from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification

from fedloom.client.models.load import load_model
from fedloom.client.models.start import start_of
from fedloom.core.config.run import ModelSection, RunConfig
from fedloom.core.schema import LORA

IDS = torch.tensor([[101, 2204, 2143, 102], [101, 2919, 5436, 102]])


@pytest.fixture
def public_start(tiny_base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter whose A is found from the activations of some rows, by PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
        task_type="SEQ_CLS",
    )
    model: PeftModel = get_peft_model(base, settings)
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1000, 3000, (8, 12), generator=draw)} for _ in range(12)]
    initialize_lora_eva_weights(model, rows, forward_fn=lambda model, row: model(**row), show_progress_bar=False)
    model.save_pretrained(str(tmp_path / "eva"))
    return tmp_path / "eva"


@pytest.mark.filterwarnings("ignore")
def test_a_run_begins_from_evas_start_as_the_base_model(model_section: ModelSection, public_start: Path) -> None:
    tables = {"run": {"name": "eva", "rounds": 1}, "data": {"source": "x.csv"}, "start": {"adapter": str(public_start)}}
    tables |= {"model": model_section.model_dump(), "train": {"steps": 1, "sampling_rate": 0.1}}
    config = RunConfig.model_validate(tables | {"adapter": {"rank": 4, "alpha": 8}})
    model = load_model(config.model, config.adapter)
    fresh = {name: value for name, value in model.read(model.schema).items() if name.endswith("lora_A.weight")}

    model.load(start_of(config, model))

    theirs, values = load_file(public_start / "adapter_model.safetensors"), model.read(model.schema)
    assert all(np.array_equal(values[spec.name], theirs[spec.name]) for spec in model.schema.select(LORA).tensors)
    assert not any(np.allclose(values[name], value, atol=1e-3) for name, value in fresh.items())
    base = AutoModelForSequenceClassification.from_pretrained(model_section.base, num_labels=2)
    expected = PeftModel.from_pretrained(base, str(public_start)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
