"""VeRA against PEFT's own layer; Hydra, Tucker and two pairs against their papers' formulas."""

import hashlib

import numpy as np
import pytest
import torch
from peft import VeraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from fedloom.client.adapters.wrapping import plain
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.strategies.start import starting_adapter
from tests.conftest import make_model

IDS = torch.tensor([[101, 2204, 2143, 102], [101, 2919, 5436, 102]])
LAYER = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_vera_is_pefts(model_section: ModelSection) -> None:
    """With the same A and B the same vectors give the same scores."""
    model = make_model(model_section, AdapterSection(kind="vera", rank=6))
    values = model.read(model.schema)
    names = [name.removesuffix(".vera_lambda_b") for name in values if name.endswith(".vera_lambda_b")]
    ours = model.model.get_base_model().get_submodule(names[0])
    base = AutoModelForSequenceClassification.from_pretrained(model_section.base, num_labels=2)
    theirs = get_peft_model(base, VeraConfig(r=6, target_modules=names, vera_dropout=0.0)).eval()
    with torch.no_grad():
        for name in names:
            layer = theirs.get_submodule(f"base_model.model.{name}")
            layer.vera_A["default"].copy_(ours.right)
            layer.vera_B["default"].copy_(ours.left)
            layer.vera_lambda_b["default"].copy_(torch.from_numpy(values[f"{name}.vera_lambda_b"]))
            layer.vera_lambda_d["default"].copy_(0.1 + torch.from_numpy(values[f"{name}.vera_lambda_d"]))
        for part in ("weight", "bias"):
            head = theirs.get_submodule("base_model.model.classifier").get_parameter(part)
            head.copy_(torch.from_numpy(values[f"base_model.model.classifier.{part}"]))

        expected, found = theirs(input_ids=IDS).logits, model.model(input_ids=IDS).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_veras_matrices_are_the_seeds_and_no_layers_own(model_section: ModelSection) -> None:
    """Everybody has the same, whatever else is drawn in the process; another seed has others."""

    def drawn(**options: object) -> torch.Tensor:
        section = AdapterSection.model_validate({"kind": "vera", "rank": 4, **options})
        layer = load_model(model_section, section).model.get_base_model().get_submodule(LAYER)
        return torch.cat([layer.right, layer.left.t()])

    once = drawn()
    torch.manual_seed(17)
    assert torch.equal(drawn(), once)
    assert torch.equal(drawn(targets=("query", "dense")), once)
    assert not torch.allclose(drawn(seed=1), once, atol=0.1)
    # Kaiming-uniform for 32 inputs and for rank 4.
    assert once[:4].abs().max() == pytest.approx(np.sqrt(6 / 32), rel=0.05)
    assert once[4:].abs().max() == pytest.approx(np.sqrt(6 / 4), rel=0.05)
    # The very bytes, which no release of a library may change: a client would have another model than the others.
    assert hashlib.sha256(once.numpy().tobytes()).hexdigest()[:16] == "5a1e35b88f322b9b"


def test_hydra_and_tucker_merge_as_their_papers_say(model_section: ModelSection) -> None:
    """In numpy, float64: W0 + B_p A_p + B_s A_s W0 and b + B_s A_s b; W0 + s U G V^T."""
    for kind in ("hydra", "tucker"):
        model = make_model(model_section, AdapterSection(kind=kind, rank=3, alpha=6))
        layer = plain(model.model.get_base_model().get_submodule(LAYER).inner)
        weight, bias = (each.detach().double().numpy().copy() for each in (layer.weight, layer.bias))
        values = {name.rpartition(".")[2]: v for name, v in model.read(model.schema).items() if name.startswith(LAYER)}
        model.adapter.merge(model.model)
        if kind == "hydra":
            behind = values["sequential_B"] @ values["sequential_A"]
            expected = weight + values["parallel_B"] @ values["parallel_A"] + behind @ weight
            np.testing.assert_allclose(layer.bias.detach().numpy(), bias + behind @ bias, rtol=1e-4, atol=1e-5)
        else:
            expected = weight + 2.0 * values["tucker_U"] @ values["tucker_G"] @ values["tucker_V"]
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "zero"),
    [("hydra", {"parallel_B", "sequential_B"}), ("tucker", {"tucker_G"}), ("vera", {"vera_lambda_b", "vera_lambda_d"})],
)
def test_what_starts_at_zero_leaves_the_rest_a_gradient(model_section: ModelSection, kind: str, zero: set[str]) -> None:
    """A product of factors that all start at zero would never move."""
    model = load_model(model_section, AdapterSection(kind=kind, rank=3))

    start = starting_adapter(model.schema, 5)

    own = {spec.name: spec.role for spec in model.schema.tensors if spec.role != "head"}
    assert {role for name, role in own.items() if not start[name].any()} == zero


def test_two_pairs_are_one_of_twice_the_rank(model_section: ModelSection) -> None:
    """W0 + s [B_s B_o] [A_s; A_o] in numpy, float64; each pair has one role, an A that is drawn and a B of zeros."""
    model = make_model(model_section, AdapterSection(kind="dual-lora", rank=3, alpha=6))
    specs = {spec.name: spec for spec in model.schema.tensors if spec.module == LAYER}
    drawn = starting_adapter(model.schema, 5)
    values = {name.rpartition(".")[2]: v for name, v in model.read(model.schema).items() if name in specs}
    layer = plain(model.model.get_base_model().get_submodule(LAYER).inner)
    before = layer.weight.detach().double().numpy().copy()

    model.adapter.merge(model.model)

    b, a = np.hstack([values["shared_B"], values["own_B"]]), np.vstack([values["shared_A"], values["own_A"]])
    np.testing.assert_allclose(layer.weight.detach().numpy(), before + 2.0 * b @ a, rtol=1e-4, atol=1e-5)
    assert [(spec.role, spec.rank_axis) for spec in specs.values()] == [
        ("shared", 0),
        ("shared", 1),
        ("own", 0),
        ("own", 1),
    ]
    assert [drawn[name].any() for name in specs] == [True, False, True, False]
    assert {model.schema.with_rank(2).select([name]).tensors[0].shape for name in specs} == {(2, 32), (32, 2)}


def test_a_client_may_work_at_a_lower_rank_of_hydra(model_section: ModelSection) -> None:
    model = load_model(model_section, AdapterSection(kind="hydra", rank=3))

    shapes = {spec.role: spec.shape for spec in model.schema.with_rank(2).tensors}

    assert shapes["parallel_A"] == shapes["sequential_A"] == (2, 32)
    assert shapes["parallel_B"] == shapes["sequential_B"] == (32, 2)
