"""`adapter.layers`: every kind on some of the transformer's layers, and PEFT's own choice of the same ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from fedloom.client.adapters.numbered_layers import in_layers, numbered_layers
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_model
from fedloom.core import registry
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.schema import Role
from tests.conftest import TARGETS, make_model

KINDS = [
    name
    for name, entry in registry.entries("adapters").items()
    if entry.ours and "layers" in registry.options_model("adapters", name).model_fields
]
IDS = torch.tensor([[101, 2204, 2143, 102], [101, 2919, 5436, 102]])
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def section(**values: Any) -> AdapterSection:
    return AdapterSection.model_validate({"rank": 4, **values})


def own(base: ModelSection, adapter: AdapterSection) -> list[str]:
    """Names of the tensors of the kind itself."""
    return [spec.name for spec in load_model(base, adapter).schema.tensors if spec.role != Role.HEAD]


@pytest.fixture
def bert(tiny_base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(tiny_base)
    return model


def test_kinds_with_targets_have_it() -> None:
    assert {"lora", "bias", "layernorm", "ia3", "ssf", "miss", "lora-sb", "svfit", "sparse", "vera"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_to_the_layers(model_section: ModelSection, kind: str) -> None:
    """The tensors are those that it has there without the option, and what layers share; the head is trained too."""
    last = load_model(model_section, section(kind=kind, layers=[-1])).schema

    assert Role.HEAD in last.roles
    found = [spec.name for spec in last.tensors if spec.role != Role.HEAD]
    everywhere = own(model_section, section(kind=kind))
    assert found == [name for name in everywhere if "encoder.layer.1." in name or name.startswith("compacter.")]
    assert found


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_numbers_count_from_either_end_in_any_model(small_bases: dict[str, Path], architecture: str) -> None:
    base = ModelSection(base=str(small_bases[architecture]), labels=("no", "yes"), max_length=16)
    first, second, both = (
        own(base, section(targets=TARGETS[architecture], layers=layers)) for layers in ([0], [1], [-1, 0, 1])
    )

    assert first == own(base, section(targets=TARGETS[architecture], layers=[-2]))
    assert not set(first) & set(second)
    assert both == own(base, section(targets=TARGETS[architecture])) == first + second


def test_what_is_outside_of_all_layers_is_left_out(bert: PreTrainedModel) -> None:
    names = [name for name, _ in bert.named_parameters()]

    assert in_layers(bert, None, names) == names
    kept = in_layers(bert, (0, 1), names)
    assert {name for name in names if name not in kept} == {
        name for name in names if name.startswith(("embeddings.", "pooler."))
    }


def test_peft_chooses_the_same_layers(model_section: ModelSection, tmp_path: Path) -> None:
    """The export says so in PEFT's words, and reloads to equal scores."""
    model = make_model(model_section, section(targets=["query", "dense"], layers=[-1]))
    save_adapter(model, tmp_path / "adapter", {})

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["layers_to_transform"], settings["layers_pattern"]) == ([1], ["layer"])
    kind = AutoModelForSequenceClassification
    base = kind.from_pretrained(model_section.base, num_labels=2)
    words = LoraConfig(target_modules=["query", "dense"], layers_to_transform=[1], layers_pattern=["layer"])
    theirs = get_peft_model(base, words)
    assert set(settings["target_modules"]) == set(theirs.targeted_module_names)
    again = PeftModel.from_pretrained(kind.from_pretrained(model_section.base, num_labels=2), tmp_path / "adapter")
    with torch.no_grad():
        found, expected = again.eval()(input_ids=IDS).logits, model.model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_it_the_export_is_as_before(model_section: ModelSection, tmp_path: Path) -> None:
    save_adapter(make_model(model_section, section()), tmp_path / "adapter", {})

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["layers_to_transform"] is settings["layers_pattern"] is None


def test_no_gradient_goes_below_the_first_of_them(model_section: ModelSection) -> None:
    """Where the time is saved."""
    model = make_model(model_section, section(layers=[1]))
    model.trainable(model.schema.roles)
    layers, asked = model.model.get_base_model().bert.encoder.layer, []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].requires_grad))
        layer.register_forward_hook(lambda _, __, result: asked.append(result.requires_grad))

    model.logits({"input_ids": IDS})

    assert asked == [False, False, False, True]


def test_a_layer_that_is_not_there_is_refused(model_section: ModelSection) -> None:
    with pytest.raises(ModelError, match=r"layers names 2, -3; \w+ has 2 layers: name some of 0 to 1, or of -1 \(the"):
        load_model(model_section, section(layers=[0, 2, -3]))
    with pytest.raises(ModelError, match=r"layers names none; \w+ has 2 layers"):
        load_model(model_section, section(layers=[]))


def test_a_target_outside_of_the_layers_is_refused(model_section: ModelSection) -> None:
    """BERT's pooler is a linear layer named dense too, so the name alone would not do."""
    with pytest.raises(ModelError, match=r"no such linear layer in adapter\.layers = \[0\]; it has dense, key, query"):
        load_model(model_section, section(targets=["c_attn"], layers=[0]))


@pytest.mark.parametrize("layers", [["last"], [1.5], 1])
def test_what_is_no_list_of_numbers_is_refused(model_section: ModelSection, layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"option 'layers' of adapter 'lora' is .*layers: .*tuple\[int, ...\]"):
        load_model(model_section, section(layers=layers))


def test_a_model_without_one_list_of_layers_is_refused(bert: PreTrainedModel) -> None:
    """Two lists of one length are layers' parts, as of a model with one list of attentions and one of feed-forwards."""
    bert.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert numbered_layers(bert, (-1,)).have("more.1.weight")
    bert.more.append(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"has encoder\.layer of 2, more of 3; remove adapter\.layers"):
        numbered_layers(bert, (0,))
    del bert.more
    bert.encoder.layer = nn.Sequential(*bert.encoder.layer)
    with pytest.raises(ModelError, match=r"BertModel has none; remove adapter\.layers"):
        numbered_layers(bert, (0,))
