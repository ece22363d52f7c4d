"""A merged model predicts what the base model with its adapter predicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.tasks.api import task_named
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Role
from tests.conftest import make_model

TEXTS = ["good film", "an awful plot and a poor actor", "sad"]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Scores of each text by itself, so that padding has no part in them."""
    with torch.inference_mode():
        found = [model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits for text in TEXTS]
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("bert", "text-classification"), ("llama", "token-classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")],
)
def test_merged_weights_predict_the_same(build_task: Any, tmp_path: Path, architecture: str, task: str) -> None:
    adapted = build_task(architecture, task)
    expected = logits(adapted.model, adapted.tokenizer)
    with adapted.model.disable_adapter():
        assert not torch.allclose(logits(adapted.model, adapted.tokenizer), expected, atol=1e-2)

    save_merged(adapted, tmp_path / "model", {"run": "r", "task": task})

    plain = getattr(transformers, task_named(task).traits.model).from_pretrained(tmp_path / "model").eval()
    found = logits(plain, AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert torch.allclose(found, expected, atol=5e-5, rtol=0)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    assert json.loads((tmp_path / "model" / "fedloom.json").read_text())["run"] == "r"
    assert task_named(task).traits.model in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["bias", "head"])
def test_biases_and_heads_are_in_the_model(build_model: Any, tmp_path: Path, kind: Any) -> None:
    adapted = build_model(AdapterSection(kind=kind))
    expected = logits(adapted.model, adapted.tokenizer)

    save_merged(adapted, tmp_path / "model", {})

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(logits(plain, adapted.tokenizer), expected, atol=1e-5, rtol=0)
    assert plain.config.id2label == {0: "negative", 1: "positive"}


def test_corrections_of_frozen_weights_are_in_the_model(tiny_model: AdapterModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    factors = {}
    for pair in tiny_model.schema.pairs:
        layer: Any = tiny_model.model.get_submodule(f"base_model.model.{pair.module}")
        out_size, in_size = layer.base_layer.weight.shape
        factors[f"{pair.module}.{Role.BASE_A}"] = rng.normal(0, 0.3, (2, in_size)).astype(np.float32)
        factors[f"{pair.module}.{Role.BASE_B}"] = rng.normal(0, 0.3, (out_size, 2)).astype(np.float32)
    before = logits(tiny_model.model, tiny_model.tokenizer)
    tiny_model.load(factors)
    expected = logits(tiny_model.model, tiny_model.tokenizer)
    assert not torch.allclose(before, expected, atol=1e-2)

    save_merged(tiny_model, tmp_path / "model", {})

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(logits(plain, tiny_model.tokenizer), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_weight_that_the_embeddings_share_is_refused(small_bases: Any, tmp_path: Path) -> None:
    section = ModelSection(base=str(small_bases["gpt2"]), task="causal-lm", head="frozen", max_length=24)
    tied = make_model(section, AdapterSection(rank=2, alpha=4, targets=("lm_head",)))

    with pytest.raises(ModelError, match="lm_head shares its weight with the embeddings"):
        save_merged(tied, tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


def test_quantised_and_endless_weights_are_refused(build_model: Any, tmp_path: Path) -> None:
    adapted = build_model(AdapterSection(rank=2))
    layer = adapted.model.get_base_model().bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layer\.0\.output\.dense\.weight is quantised"):
        save_merged(adapted, tmp_path / "model", {})

    diverged = build_model(AdapterSection(rank=2))
    name = next(each.name for each in diverged.schema.tensors if each.role == Role.LORA_B)
    diverged.load({name: np.full(diverged.slots[name].spec.shape, np.nan, np.float32)})
    with pytest.raises(ModelError, match="cannot be merged"):
        save_merged(diverged, tmp_path / "model", {})
    assert not (tmp_path / "model").exists()


def test_a_folder_with_other_files_is_left_alone(tiny_model: AdapterModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")

    with pytest.raises(ConfigError, match=r"holds thesis\.tex"):
        save_merged(tiny_model, tmp_path, {})

    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]
