"""Layers that see other rows than one for each example: known by name, held against a loop, refused otherwise."""

from pathlib import Path

import pytest
import torch

from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import layouts, recording
from fedloom.core.config.run import AdapterSection, ModelSection
from tests.families import PICTURES, save_family
from tests.family_gradients import TOLERANCE, Case, measured

DEBERTA = "base_model.model.deberta.encoder.layer.0.attention.self"


@pytest.mark.parametrize("family", ["opt", "swin", "qwen2-moe"])
def test_layers_that_see_several_rows_for_an_example_are_refused_unless_they_are_listed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_FLATTENED", {})

    task = "image-classification" if family in PICTURES else "text-classification"

    assert (
        "cannot be clipped per example"
        in measured(Case(family, task, "all-linear"), save_family(family, tmp_path)).refused
    )


def test_a_layer_listed_although_its_rows_lie_otherwise_fails_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "transformers.models.xlnet.modeling_xlnet.XLNetFeedForward"
    monkeypatch.setattr(layouts, "_FLATTENED", {kind: ("layer_1", "layer_2")})

    found = measured(Case("xlnet", "text-classification", "auto"), save_family("xlnet", tmp_path))

    assert "sensitivity probe: in a batch, an example's gradient is not the one it has alone" in found.refused


@pytest.mark.parametrize(("targets", "patched"), [(("query_proj",), True), (("value_proj",), False)])
def test_deberta_gives_the_same_scores_with_positions_for_each_example(
    targets: tuple[str, ...], patched: bool, tmp_path: Path
) -> None:
    section = ModelSection(base=str(save_family("deberta", tmp_path)), labels=("a", "b"), max_length=16)
    model = load_model(section, AdapterSection(rank=2, alpha=4, targets=targets))
    ids = torch.tensor([[5, 17, 40, 7], [9, 9, 12, 30], [8, 2, 2, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    attention = model.model.get_submodule(DEBERTA)
    parameters = model.trainable(model.schema.roles)
    plain = model.logits(batch)

    with recording(model.model, parameters) as tape:
        tape.begin(3)
        scores = model.logits(batch)
        assert ("disentangled_attention_bias" in vars(attention)) == patched

    torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-6)
    assert "disentangled_attention_bias" not in vars(attention)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "smollm3", "mixtral"])
def test_rms_norms_train_privately(family: str, tmp_path: Path) -> None:
    """Qwen3 has some for each head, Gemma's weights are what is above one."""
    found = measured(Case(family, "causal-lm", "auto"), save_family(family, tmp_path), "layernorm")

    assert not found.refused
    assert found.values >= 5 * 32
    assert 0 < found.gradient <= TOLERANCE
    assert 0 < found.step <= TOLERANCE
