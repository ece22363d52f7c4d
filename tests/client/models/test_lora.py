"""LoRA on GPT-2, whose linear layers keep their weight transposed."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2Model

from fedloom.client.adapters.lora import MAGNITUDE
from fedloom.client.assets.fetch import fetch
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role

TARGETS = ("c_attn", "c_proj", "c_fc")


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 1-layer GPT-2 of width 16; attn.c_proj is square, so that a transposed weight would fit."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm-l6"), local_files_only=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(base: Path, adapter: AdapterSection) -> AdapterModel:
    return load_model(ModelSection(base=str(base), labels=("negative", "positive"), max_length=16), adapter)


def logits(model: AdapterModel, rows: Rows) -> torch.Tensor:
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    with torch.inference_mode():
        return model.logits(batch)


def random_adapter(model: AdapterModel) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    rng = np.random.default_rng(3)
    return {spec.name: rng.normal(0, 0.3, spec.shape).astype(np.float32) for spec in model.schema.tensors}


def test_a_pair_on_a_transposed_layer_adds_scale_b_a(gpt2_base: Path, rows: Rows) -> None:
    model = load(gpt2_base, AdapterSection(rank=2, alpha=6, targets=TARGETS))
    values = random_adapter(model)
    model.load(values)
    adapted = logits(model, rows)

    plain = load(gpt2_base, AdapterSection(rank=2, alpha=6, targets=TARGETS))
    plain.load({name: value for name, value in values.items() if "lora_" not in name})
    assert not torch.allclose(logits(plain, rows), adapted, atol=1e-2)
    for pair in model.schema.pairs:
        layer = plain.model.get_submodule(f"base_model.model.{pair.module}").base_layer
        a, b = (torch.from_numpy(values[f"base_model.model.{pair.module}.lora_{side}.weight"]) for side in "AB")
        with torch.no_grad():
            layer.weight += 3.0 * (b @ a).t()

    torch.testing.assert_close(logits(plain, rows), adapted, rtol=1e-4, atol=1e-5)


def test_a_correction_of_a_transposed_weight_equals_the_pair_it_folds_in(gpt2_base: Path, rows: Rows) -> None:
    model = load(gpt2_base, AdapterSection(rank=2, alpha=6, targets=TARGETS))
    values = random_adapter(model)
    model.load(values)
    adapted = logits(model, rows)

    zeros = {name: np.zeros_like(value) for name, value in values.items() if "lora_" in name}
    folded = {
        f"{pair.module}.base_{side}": values[f"base_model.model.{pair.module}.lora_{side}.weight"]
        for pair in model.schema.pairs
        for side in "AB"
    }
    model.load(zeros | folded)

    torch.testing.assert_close(logits(model, rows), adapted, rtol=1e-4, atol=1e-5)


def test_the_export_predicts_the_same(gpt2_base: Path, rows: Rows, tmp_path: Path) -> None:
    model = load(gpt2_base, AdapterSection(rank=2, targets=TARGETS))
    model.load(random_adapter(model))
    save_adapter(model, tmp_path / "out", {"labels": ["negative", "positive"]})

    loaded = load_exported(gpt2_base, tmp_path / "out", 2)

    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    with torch.inference_mode():
        scores = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(scores, logits(model, rows), rtol=1e-5, atol=1e-6)


def test_bias_tuning_works_on_transposed_layers_without_a_warning(gpt2_base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = load(gpt2_base, AdapterSection(kind="bias", targets=("c_attn",)))

    assert "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias" in model.slots
    assert len(model.schema.select({Role.BIAS}).tensors) == 7  # four linear layers, three layer norms


def test_an_unknown_target_is_answered_with_the_transposed_layers_too(gpt2_base: Path) -> None:
    for unknown in ("query", "n.c_attn", "mlp.c_attn", "attn.h.c_attn"):
        with pytest.raises(ModelError, match=f"{unknown}: .* no such linear layer; it has c_attn, c_fc, c_proj; name"):
            load(gpt2_base, AdapterSection(rank=2, targets=("c_fc", unknown)))


def test_parts_of_a_full_name_tell_layers_of_one_name_apart(gpt2_base: Path) -> None:
    def pairs(*targets: str) -> set[str]:
        model = load(gpt2_base, AdapterSection(rank=2, targets=targets))
        return {pair.module.partition(".h.")[2] for pair in model.schema.pairs}

    assert pairs("mlp.c_proj") == {"0.mlp.c_proj"}
    assert pairs("c_proj") == pairs("h.mlp.c_proj", "transformer.0.attn.c_proj") == {"0.attn.c_proj", "0.mlp.c_proj"}


def options(**values: object) -> AdapterSection:
    return AdapterSection.model_validate({"rank": 4, "alpha": 6, "targets": TARGETS} | values)


def test_rslora_divides_alpha_by_the_root_of_the_rank(gpt2_base: Path, rows: Rows, tmp_path: Path) -> None:
    """alpha / sqrt(4) is a plain alpha of twice as much over 4; a correction that is exported keeps that scale."""
    model, plain = load(gpt2_base, options(rslora=True)), load(gpt2_base, options(alpha=12))
    values = random_adapter(model)
    model.load(values)
    plain.load(values)

    assert model.schema.scale == 3.0
    torch.testing.assert_close(logits(model, rows), logits(plain, rows), rtol=1e-6, atol=1e-7)

    rng = np.random.default_rng(4)
    corrected = model.schema.with_base(2)
    model.load({s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in corrected.tensors})
    save_adapter(model, tmp_path / "out", {"labels": ["negative", "positive"]})
    loaded = load_exported(gpt2_base, tmp_path / "out", 2)
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    with torch.inference_mode():
        scores = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(scores, logits(model, rows), rtol=1e-4, atol=1e-5)


def test_dora_gives_every_row_of_the_weight_its_length(gpt2_base: Path) -> None:
    """W = m V / ||V|| with V = W0 + s B A (equation 5 of the paper), on a transposed layer, in numpy."""
    model = load(gpt2_base, options(dora=True))
    values = random_adapter(model)
    name = model.schema.pairs[0].module
    weight = model.model.get_submodule(f"base_model.model.{name}").base_layer.weight.detach().double().numpy().T
    a, b, change = (
        values[f"base_model.model.{name}.lora_{each}"] for each in ("A.weight", "B.weight", "magnitude_vector")
    )
    model.load(values)
    merged = model.model.merge_and_unload().get_submodule(name).weight.detach().numpy().T

    v = weight + 1.5 * b @ a
    length = np.linalg.norm(weight, axis=1) + change
    np.testing.assert_allclose(merged, (length / np.linalg.norm(v, axis=1))[:, None] * v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), np.abs(length), rtol=1e-5)
    assert model.schema.select({MAGNITUDE}).size == sum(
        spec.shape[0] for spec in model.schema.tensors if spec.role == "lora_B"
    )
