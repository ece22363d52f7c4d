"""Which model families load and train privately: what docs/families.md says, measured anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from docs import make_families
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import layouts, recording
from fedloom.core.config.run import AdapterSection, ModelSection
from tests.families import FAMILIES, LANGUAGE_MODELS, PICTURES, SPEECH, save_family
from tests.family_gradients import CASES, TARGETS, TOLERANCE, Case, measured, recorded

REFUSED = {
    ("bart", "text-classification"): "is an encoder and a decoder",
    ("t5", "text-classification"): "is an encoder and a decoder",
    ("xlnet", "text-classification"): "its gradient mixes examples",
}
"""By family and task, for all targets. XLNet's layers see (tokens, examples, ...)."""
DEBERTA = "base_model.model.deberta.encoder.layer.0.attention.self"

BaseOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """The folder of a family's model, written once."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = save_family(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.task}-{case.targets}")
def test_a_private_step_is_that_of_a_loop_over_the_examples_as_the_page_says(case: Case, base_of: BaseOf) -> None:
    found, told = measured(case, base_of(case.family)), recorded()[case]

    assert (found.layers, found.values, found.refused) == (told.layers, told.values, told.refused)
    if reason := REFUSED.get((case.family, case.task)):
        assert reason in found.refused
        return
    assert not found.refused
    for result in (found, told):
        assert 0 < result.gradient <= TOLERANCE
        assert 0 < result.step <= TOLERANCE


def test_the_page_has_every_case_that_is_measured() -> None:
    told = recorded()

    assert set(told) == set(CASES)
    assert {case.family for case in CASES} == {*FAMILIES, *PICTURES, *SPEECH} == set(make_families.NAMES)
    assert make_families.TARGET.read_text(encoding="utf-8") == make_families.page()


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_model_is_measured_on_both_its_tasks(family: str) -> None:
    assert {case.task for case in CASES if case.family == family} == {"causal-lm", "text-classification"}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_decoder_whose_tokenizer_has_no_padding_token_trains_too(
    architecture: str, targets: str, small_bases: dict[str, Path]
) -> None:
    found = measured(Case(architecture, "text-classification", targets), small_bases[architecture])

    assert not found.refused
    assert 0 < found.gradient <= TOLERANCE


@pytest.mark.parametrize("family", ["opt", "swin", "qwen2-moe"])
def test_layers_that_see_several_rows_for_an_example_are_refused_unless_they_are_listed(
    family: str, base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_FLATTENED", {})

    task = "image-classification" if family in PICTURES else "text-classification"

    assert "cannot be clipped per example" in measured(Case(family, task, "all-linear"), base_of(family)).refused


def test_a_layer_listed_although_its_rows_lie_otherwise_fails_the_probe(
    base_of: BaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "transformers.models.xlnet.modeling_xlnet.XLNetFeedForward"
    monkeypatch.setattr(layouts, "_FLATTENED", {kind: ("layer_1", "layer_2")})

    found = measured(Case("xlnet", "text-classification", "auto"), base_of("xlnet"))

    assert "sensitivity probe: in a batch, an example's gradient is not the one it has alone" in found.refused


@pytest.mark.parametrize(("targets", "patched"), [(("query_proj",), True), (("value_proj",), False)])
def test_deberta_gives_the_same_scores_with_positions_for_each_example(
    targets: tuple[str, ...], patched: bool, base_of: BaseOf
) -> None:
    section = ModelSection(base=str(base_of("deberta")), labels=("a", "b"), max_length=16)
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
def test_rms_norms_train_privately(family: str, base_of: BaseOf) -> None:
    """Qwen3 has some for each head, Gemma's weights are what is above one."""
    found = measured(Case(family, "causal-lm", "auto"), base_of(family), "layernorm")

    assert not found.refused
    assert found.values >= 5 * 32
    assert 0 < found.gradient <= TOLERANCE
    assert 0 < found.step <= TOLERANCE
