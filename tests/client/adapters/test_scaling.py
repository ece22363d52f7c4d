"""(IA)³ against PEFT's own layer, SSF and PEQA against their formulas, and LN-tuning against what PEFT loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.head import Head
from fedloom.client.adapters.layer_norm import LayerNorm
from fedloom.client.adapters.scaling.peqa import rounded
from fedloom.client.adapters.wrapping import plain
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from tests.conftest import make_model
from tests.families import save_family

IDS = torch.tensor([[101, 2204, 2143, 102], [101, 2919, 5436, 102]])
LAYER = "bert.encoder.layer.1.attention"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_ia3_is_pefts(model_section: ModelSection) -> None:
    """The same scales give the same scores, of outputs as of a feed-forward block's inputs."""
    targets, inputs = ("key", "value", "dense"), ("dense",)
    model = make_model(
        model_section, AdapterSection.model_validate({"kind": "ia3", "targets": targets, "feedforward": inputs})
    )
    values = model.read(model.schema)
    base = AutoModelForSequenceClassification.from_pretrained(model_section.base, num_labels=2)
    names = [name.removesuffix(".ia3_l") for name in values if name.endswith(".ia3_l")]
    theirs = get_peft_model(
        base, IA3Config(target_modules=names, feedforward_modules=[n for n in names if n.endswith("dense")])
    ).eval()
    with torch.no_grad():
        for name in names:
            scale: torch.Tensor = theirs.get_submodule(f"base_model.model.{name}").ia3_l["default"]
            scale.copy_(1 + torch.from_numpy(values[f"{name}.ia3_l"]).view_as(scale))
        for part in ("weight", "bias"):
            head = theirs.get_submodule("base_model.model.classifier").get_parameter(part)
            head.copy_(torch.from_numpy(values[f"base_model.model.classifier.{part}"]))

        expected, found = theirs(input_ids=IDS).logits, model.model(input_ids=IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ia3_refuses_a_feedforward_layer_that_is_no_target(model_section: ModelSection) -> None:
    adapter = AdapterSection.model_validate({"kind": "ia3", "targets": ("key",), "feedforward": ("dense",)})

    with pytest.raises(ModelError, match="names dense, which is no target; the targets are key: name some"):
        load_model(model_section, adapter)


def test_ssf_scales_and_shifts_what_a_linear_layer_and_a_norm_give(model_section: ModelSection) -> None:
    """Equation 2 of the paper, in numpy on the pretrained weights."""
    model = make_model(model_section, AdapterSection(kind="ssf", targets=("query",)))
    values, base = model.read(model.schema), model.model.get_base_model()
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))

    for name in (f"{LAYER}.self.query", f"{LAYER}.output.LayerNorm"):
        module = base.get_submodule(name)
        layer = plain(module.inner)
        with torch.no_grad():
            found = module(x).numpy()
            if name.endswith("query"):
                y = x.numpy() @ layer.weight.numpy().T + layer.bias.numpy()
            else:
                y = F.layer_norm(x, (32,), layer.weight, layer.bias, layer.eps).numpy()
        expected = (1 + values[f"{name}.scale"]) * y + values[f"{name}.shift"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_ssf_shifts_no_layer_without_a_bias(small_bases: dict[str, Path]) -> None:
    """Its merged model has no place for it."""
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)

    model = load_model(section, AdapterSection(kind="ssf", targets=("q_proj",)))

    assert model.schema.roles == {"scale", "head"}


def test_ssf_can_leave_out_the_norms(model_section: ModelSection) -> None:
    adapter = AdapterSection.model_validate({"kind": "ssf", "targets": ("query",), "norms": False})

    model = load_model(model_section, adapter)

    assert {spec.module.rpartition(".")[2] for spec in model.schema.tensors} == {"query", "classifier"}


@pytest.mark.parametrize("bits", [4, 8])
def test_peqa_rounds_to_the_nearest_whole_number_of_a_rows_scale(bits: int) -> None:
    """In numpy, float64: at most half a step from the weight, on 2^bits values a row, and zero is one of them."""
    draw = np.random.default_rng(0)
    weight = draw.normal(0, 0.1, (9, 200)).astype(np.float32)
    weight[0], weight[1], weight[2, 3:] = np.abs(weight[0]), 0, 0

    found = rounded(torch.from_numpy(weight), bits).numpy().astype(np.float64)

    step = (weight.max(1).clip(0) - weight.min(1).clip(None, 0)).astype(np.float64) / (2**bits - 1)
    assert np.all(np.abs(found - weight).max(1) <= step * 0.5001)
    whole = found / np.where(step, step, 1)[:, None]
    np.testing.assert_allclose(whole, whole.round(), atol=1e-4)
    assert all(len(np.unique(row)) <= 2**bits for row in whole.round())
    assert not found[1].any()
    assert not found[2, 3:].any()


def test_peqas_result_is_whole_numbers_times_the_trained_scale(model_section: ModelSection) -> None:
    """W = (1 + d) s0 (Q - z), with what the base model's own weight is rounded to; the bias is not scaled."""
    name = f"{LAYER}.self.query"
    base = AutoModelForSequenceClassification.from_pretrained(model_section.base, num_labels=2)
    start = base.get_submodule(name)
    model = make_model(model_section, AdapterSection.model_validate({"kind": "peqa", "bits": 4}))
    layer, values = plain(model.model.get_base_model().get_submodule(name).inner), model.read(model.schema)

    model.adapter.merge(model.model)

    factor = 1 + values[f"{name}.peqa_scale"][:, None]
    with torch.no_grad():
        np.testing.assert_allclose(layer.weight, factor * rounded(start.weight, 4).numpy(), rtol=1e-5, atol=1e-7)
        assert torch.equal(layer.bias, start.bias)
        assert not torch.allclose(rounded(start.weight, 4), start.weight, atol=1e-3)


def test_layer_norms_are_counted_and_move_alone(model_section: ModelSection) -> None:
    """Two layers of two norms and the embeddings' one, of 32 weights and biases each."""
    model = load_model(model_section, AdapterSection(kind="layernorm"))

    assert model.schema.select({"norm_weight", "norm_bias"}).size == 5 * 2 * 32
    assert model.schema.roles == {"norm_weight", "norm_bias", "head"}


def test_rms_norms_are_layer_norms_without_biases(small_bases: dict[str, Path]) -> None:
    """Two layers of two norms, and the last one, of 32 weights each."""
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)

    model = load_model(section, AdapterSection(kind="layernorm"))

    assert model.schema.roles == {"norm_weight", "head"}
    assert model.schema.select({"norm_weight"}).size == 5 * 32


def test_a_model_without_layer_norms_is_refused(tmp_path: Path) -> None:
    section = ModelSection(base=str(save_family("t5", tmp_path)), labels=("no", "yes"), max_length=16)
    base = AutoModel.from_pretrained(section.base)

    with pytest.raises(ModelError, match="T5Model has no layer norm and no RMS norm that could be trained"):
        LayerNorm().attach(Host(base, Head(), None))
