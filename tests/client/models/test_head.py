"""The head is what the checkpoint lacks: drawn by the run's seed, trained, saved; or the checkpoint's own."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
)

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_base, load_model
from fedloom.client.tasks.api import task_named
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role, Schema, Start
from fedloom.strategies.start import starting_adapter
from tests.conftest import byte_tokenizer
from tests.families import FAMILIES, save_family

LABELS = ("praise", "blame")
IDS = torch.tensor([[5, 17, 40, 7], [9, 9, 12, 30]])


def section(base: Path, **values: object) -> ModelSection:
    return ModelSection.model_validate({"base": str(base), "labels": LABELS, "max_length": 16} | values)


def loaded(base: Path, **values: object) -> AdapterModel:
    return load_model(section(base, **values), AdapterSection(rank=2, alpha=4, targets="auto"))


def begun(base: Path, **values: object) -> AdapterModel:
    """The model as every client has it in round one."""
    model = loaded(base, **values)
    model.load(starting_adapter(model.schema, 3))
    return model


def logits(model: PreTrainedModel | torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        scores: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return scores


def saved(folder: Path, model: PreTrainedModel) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(folder)
    return folder


def config(**values: object) -> BertConfig:
    size = {"vocab_size": 310, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**size, intermediate_size=48, initializer_range=0.2, **values)


@pytest.fixture(scope="module")
def trained_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of praise and blame, in this order."""
    torch.manual_seed(1)
    named = config(id2label=dict(enumerate(LABELS)), label2id={name: index for index, name in enumerate(LABELS)})
    return saved(tmp_path_factory.mktemp("trained"), BertForSequenceClassification(named))


@pytest.mark.parametrize("family", ["bert", "deberta", "modernbert", "distilbert", "xlnet", "roberta", "gpt2"])
def test_what_a_checkpoint_lacks_is_of_the_head_and_the_same_everywhere(tmp_path: Path, family: str) -> None:
    base = save_family(family, tmp_path / family)
    kind = AutoModelForSequenceClassification
    _, report = kind.from_pretrained(base, num_labels=2, output_loading_info=True)
    torch.manual_seed(1)
    first = begun(base)
    torch.manual_seed(2)
    second = begun(base)

    of_head = first.schema.select([Role.HEAD])
    lacking = {f"base_model.model.{name}" for name in report["missing_keys"]}
    assert lacking
    assert lacking == {spec.name for spec in of_head.tensors}
    assert {spec.start for spec in of_head.tensors} == {Start.DRAWN}
    assert torch.equal(logits(first.model), logits(second.model))
    assert len({round(float(each), 6) for each in logits(first.model).flatten()}) == 4, "the texts are told apart"

    save_adapter(first, tmp_path / "adapter", {"labels": list(LABELS)})
    torch.manual_seed(3)
    again = load_exported(base, tmp_path / "adapter", 2)
    torch.testing.assert_close(logits(again), logits(first.model), rtol=0, atol=1e-6)


def test_loading_leaves_the_callers_random_numbers_alone(tiny_base: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    load_model(ModelSection(base=str(tiny_base), labels=LABELS), AdapterSection())

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("head", ["train", "frozen"])
def test_a_head_that_the_checkpoint_has_is_where_a_run_starts(trained_head: Path, head: str) -> None:
    plain = BertForSequenceClassification.from_pretrained(trained_head)

    model = begun(trained_head, head=head)

    torch.testing.assert_close(logits(model.model), logits(plain), rtol=0, atol=1e-6)
    of_head = model.schema.select([Role.HEAD])
    assert {spec.start for spec in of_head.tensors} == {Start.ZERO}
    assert Schema.from_json(model.schema.to_json()) == model.schema


def test_a_change_of_a_head_is_added_to_the_checkpoints(trained_head: Path, tmp_path: Path) -> None:
    model = begun(trained_head)
    name = "base_model.model.classifier.weight"
    change = np.random.default_rng(0).normal(0, 0.1, (2, 32)).astype(np.float32)

    model.load({name: change})

    stored = load_file(trained_head / "model.safetensors")["classifier.weight"].numpy()
    parameter = model.slots[name].parameter.detach().numpy()
    np.testing.assert_allclose(parameter, stored + change, rtol=0, atol=1e-7)
    save_adapter(model, tmp_path / "adapter", {"labels": list(LABELS)})
    again = load_exported(trained_head, tmp_path / "adapter", 2)
    torch.testing.assert_close(logits(again), logits(model.model), rtol=0, atol=1e-6)


def test_a_head_of_other_labels_is_not_taken_for_the_runs(trained_head: Path) -> None:
    with pytest.raises(ModelError, match=r"set model\.labels = \['praise', 'blame'\]"):
        loaded(trained_head, labels=LABELS[::-1])
    with pytest.raises(ModelError, match=r"trained for the labels \['praise', 'blame'\].*take the encoder alone"):
        loaded(trained_head, labels=("spam", "other"))
    assert loaded(trained_head, labels=("Praise", "BLAME"))


def test_a_head_without_label_names_is_taken_by_position(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", BertForSequenceClassification(config()))

    assert loaded(base, labels=("spam", "other")).schema.select([Role.HEAD]).tensors[0].start is Start.ZERO


def test_a_head_for_more_labels_gives_way_to_a_new_one(trained_head: Path, tmp_path: Path) -> None:
    model = begun(trained_head, labels=("a", "b", "c"))

    assert logits(model.model).shape == (2, 3)
    assert {spec.start for spec in model.schema.select([Role.HEAD]).tensors} == {Start.DRAWN}
    save_adapter(model, tmp_path / "adapter", {"labels": ["a", "b", "c"]})
    assert "num_labels=3, ignore_mismatched_sizes=True" in (tmp_path / "adapter" / "README.md").read_text()
    again = load_exported(trained_head, tmp_path / "adapter", 3)
    torch.testing.assert_close(logits(again), logits(model.model), rtol=0, atol=1e-6)


def test_a_frozen_head_must_be_there(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match=r'none for text-classification \(classifier\); set model\.head = "train"'):
        load_model(ModelSection(base=str(tiny_base), labels=LABELS, head="frozen"), AdapterSection())


def edited(base: Path, copy: Path, **values: object) -> Path:
    """A copy of a base model whose config.json says otherwise."""
    shutil.copytree(base, copy)
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(document | values))
    return copy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks 16 weights of BertForSequenceClassification .*encoder.layer.2"),
        ({"num_hidden_layers": 1}, "holds 16 weights that BertForSequenceClassification has no place for"),
        ({"vocab_size": 400}, "lacks 1 weights .* or has them in another shape, such as bert.embeddings.word"),
    ],
)
def test_weights_that_are_not_of_the_described_model_are_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    base = saved(tmp_path / "base", BertForMaskedLM(config()))

    with pytest.raises(ModelError, match=message):
        loaded(edited(base, tmp_path / "copy", **values))


def test_a_language_model_lacks_nothing(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "llama")
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelError, match=r"lacks 1 weights of LlamaForCausalLM .*model\.norm\.weight"):
        load_base(base, task_named("causal-lm"))


@pytest.mark.parametrize(("family", "longest"), [("roberta", 61), ("gpt2", 64), ("bert", 64), ("llama", None)])
def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path, family: str, longest: int | None) -> None:
    base = save_family(family, tmp_path / family)

    if longest is None:
        loaded(base, max_length=200)
        return
    loaded(base, max_length=longest)
    with pytest.raises(ModelError, match=f"at most {longest} tokens; .* set model.max_length = {longest}"):
        loaded(base, max_length=200)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"bart", "t5"}))
def test_layers_are_found_for_every_family(tmp_path: Path, family: str) -> None:
    base = save_family(family, tmp_path / family)
    all_linear, auto = (
        {pair.module for pair in load_model(section(base), AdapterSection(rank=2, targets=each)).schema.pairs}
        for each in ("all-linear", "auto")
    )

    assert auto <= all_linear
    assert not any("classifier" in module or "score" in module for module in all_linear)
    if family == "bert":
        assert {module.rpartition(".")[2] for module in auto} == {"query", "value"}
        assert {module.rpartition(".")[2] for module in all_linear} == {"query", "key", "value", "dense"}
