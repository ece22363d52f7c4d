"""LoRA's starts: PiSSA and OLoRA against PEFT's own and dense formulas in numpy, and a drawn orthonormal A."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

from fedloom.client.adapters.lora import LoRA
from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.merged_model import save_merged
from fedloom.client.models.exports.peft_adapter import save_adapter
from fedloom.client.models.load import load_base, load_model
from fedloom.client.models.start import start_of
from fedloom.client.policy import ComputePolicy
from fedloom.client.tasks.api import task_named
from fedloom.core.config.run import AdapterSection, ModelSection, RunConfig
from fedloom.core.errors import ConfigError, ModelError, SchemaError
from fedloom.core.schema import Role, Schema, Start, TensorSpec
from fedloom.core.tensor_file import tensor_file
from fedloom.strategies.api import Update
from fedloom.strategies.fedask import FedASK
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.ranks.hetlora import HetLoRA
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.start import starting_adapter

LAYER = "bert.encoder.layer.0.attention.self.query"
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def options(start: str, **values: object) -> AdapterSection:
    return AdapterSection.model_validate(
        {"rank": 4, "alpha": 6, "targets": ("query", "dense"), "start": start} | values
    )


def parts(model: AdapterModel) -> tuple[Matrix, Matrix, Matrix]:
    """The frozen weight, B and A of one layer, in float64."""
    layer: Any = model.model.get_base_model().get_submodule(LAYER)
    found = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    frozen, b, a = (each.detach().double().numpy().copy() for each in found)
    return frozen, b, a


def pretrained(section: ModelSection) -> Matrix:
    plain = load_base(Path(section.base), task_named("text-classification", section.labels, 16)).model
    weight: Matrix = plain.get_submodule(LAYER).weight.detach().double().numpy()
    return weight


def test_pissa_has_the_leading_singular_vectors_and_leaves_the_rest(model_section: ModelSection) -> None:
    """Equations 2 to 4 of the paper, by numpy."""
    frozen, b, a = parts(load_model(model_section, options("pissa")))

    left, values, right = np.linalg.svd(pretrained(model_section))
    np.testing.assert_allclose(1.5 * b @ a, left[:, :4] * values[:4] @ right[:4], atol=1e-6)
    np.testing.assert_allclose(frozen, left[:, 4:] * values[4:] @ right[4:], atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.diag(values[:4] / 1.5), atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.diag(values[:4] / 1.5), atol=1e-6)
    assert all(column[np.abs(column).argmax()] > 0 for column in b.T)


def test_olora_has_the_first_columns_of_the_qr_decomposition(model_section: ModelSection) -> None:
    frozen, b, a = parts(load_model(model_section, options("olora")))

    weight = pretrained(model_section)
    basis, upper = np.linalg.qr(weight)
    np.testing.assert_allclose(b @ a, basis[:, :4] @ upper[:4], atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-6)
    assert (np.diag(a) > 0).all()
    assert not np.tril(np.abs(a[:, :4]) > 1e-6, -1).any()
    np.testing.assert_allclose(frozen, weight - 1.5 * b @ a, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_it_starts_as_peft_starts(model_section: ModelSection, start: Any, rslora: bool) -> None:
    """The same products and the same frozen weights; the signs of singular vectors are each library's own."""
    ours = load_model(model_section, options(start, rslora=rslora))
    plain = load_base(Path(model_section.base), task_named("text-classification", model_section.labels, 16)).model
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "dense"], use_rslora=rslora, init_lora_weights=start
    )
    theirs = get_peft_model(plain, config)

    names = [pair.removesuffix(".base_layer") for pair, _ in theirs.named_modules() if pair.endswith(".base_layer")]
    assert len(names) == 9
    for name in names:
        one, other = (model.get_submodule(name) for model in (ours.model, theirs))
        torch.testing.assert_close(one.base_layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)
        products = [each.lora_B["default"].weight @ each.lora_A["default"].weight for each in (one, other)]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "dora"), [("pissa", False), ("olora", False), ("pissa", True)])
def test_its_export_is_twice_as_wide_and_counts_from_the_pretrained_weights(
    model_section: ModelSection, rows: Rows, tmp_path: Path, start: str, dora: bool
) -> None:
    model = load_model(model_section, options(start, dora=dora))
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    _, b0, a0 = parts(model)
    draw = np.random.default_rng(3)
    values = {each.name: draw.normal(0, 0.1, each.shape).astype(np.float32) for each in model.schema.tensors}
    model.load(values)
    _, b, a = parts(model)
    with torch.inference_mode():
        expected = model.logits(batch)

    save_adapter(model, tmp_path / "peft", {"labels": ["negative", "positive"]})
    save_merged(model, tmp_path / "merged", {"labels": ["negative", "positive"]}, keep=True)

    for name in ("peft", "merged"):
        loaded = load_exported(Path(model_section.base), tmp_path / name, 2)
        with torch.inference_mode():
            scores = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ours = [saved[f"base_model.model.{LAYER}.lora_{side}.weight"].astype(np.float64) for side in "BA"]
    assert ours[1].shape == (8, 32)
    np.testing.assert_allclose(ours[0] @ ours[1], b @ a - b0 @ a0, atol=1e-5)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 12, True)


def test_without_the_start_taken_out_the_export_would_predict_something_else(
    model_section: ModelSection, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_section, options("pissa"))
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    monkeypatch.setattr("fedloom.client.models.exports.peft_adapter.taken_out", lambda slots: {})
    save_adapter(model, tmp_path / "peft", {"labels": ["negative", "positive"]})

    loaded = load_exported(Path(model_section.base), tmp_path / "peft", 2)
    with torch.inference_mode():
        scores = loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert not torch.allclose(scores, model.logits(batch), atol=1e-2)


def test_its_changes_are_zero_before_the_first_round_and_its_a_is_no_factor_of_a_product(
    model_section: ModelSection,
) -> None:
    schema = load_model(model_section, options("pissa")).schema

    own = [each for each in schema.tensors if each.role != Role.HEAD]
    assert {(each.role, each.start) for each in own} == {("pissa_A", Start.ZERO), (Role.LORA_B, Start.ZERO)}
    assert schema.pairs == ()
    drawn = starting_adapter(schema, 1)
    assert not any(drawn[each.name].any() for each in own)


@pytest.mark.parametrize("strategy", [FedSVD(), FedASK(), FFA(orthonormal=True), FLoRA(), HetLoRA(ranks={"a": 2})])
def test_strategies_that_multiply_factors_or_cut_ranks_refuse_it(model_section: ModelSection, strategy: Any) -> None:
    schema = load_model(model_section, options("pissa")).schema

    with pytest.raises(SchemaError, match=r"adapter has head, lora_B, pissa_A; change adapter\.kind"):
        strategy.init(schema, starting_adapter(schema, 0), 0)


def test_ffa_averages_b_exactly_over_the_starting_a(model_section: ModelSection) -> None:
    """The mean of the clients' weights is the weight of the mean, with A resting at the start."""
    model = load_model(model_section, options("olora"))
    strategy, schema = FFA(), model.schema
    state = strategy.init(schema, starting_adapter(schema, 0), 0)
    plan = strategy.plan(state, 0, "a")
    assert {each.role for each in schema.select(plan.train).tensors} == {Role.LORA_B, Role.HEAD}
    weights, acc = [], None
    for client in range(2):
        draw = np.random.default_rng(client)
        delta = {
            each.name: draw.normal(size=each.shape).astype(np.float32) for each in schema.select(plan.train).tensors
        }
        model.show({**state.adapter, **{name: state.adapter[name] + value for name, value in delta.items()}})
        frozen, b, a = parts(model)
        weights.append(frozen + 1.5 * b @ a)
        acc = strategy.fold(state, acc, Update(str(client), 1.0, plan.broadcast, delta))

    model.show(strategy.commit(state, acc).adapter)
    frozen, b, a = parts(model)

    np.testing.assert_allclose(frozen + 1.5 * b @ a, (weights[0] + weights[1]) / 2, atol=1e-5)


def run(base: Path, start: Path, adapter: AdapterSection) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "on", "rounds": 1},
            "model": {"base": str(base), "labels": ["negative", "positive"], "max_length": 16},
            "adapter": adapter.model_dump(),
            "train": {"steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1},
            "privacy": {"enabled": False},
            "start": {"adapter": str(start)},
        }
    )


@pytest.mark.parametrize(("earlier", "later"), [("pissa", "pissa"), ("pissa", "olora"), ("pissa", "kaiming")])
def test_a_run_goes_on_from_changes_of_the_same_start_alone(
    model_section: ModelSection, tmp_path: Path, earlier: str, later: str
) -> None:
    """Changes that count from another start would be another model."""
    model = load_model(model_section, options(earlier))
    values = {each.name: np.full(each.shape, 0.1, np.float32) for each in model.schema.tensors}
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(tensor_file(values, model.schema, {}))
    config = run(Path(model_section.base), path, options(later))

    if earlier == later:
        assert start_of(config, load_model(model_section, options(later))).keys() == values.keys()
        return
    with pytest.raises(ConfigError, match=r"set \[adapter\] and model.head as they were"):
        start_of(config, load_model(model_section, options(later)))


def test_a_peft_adapter_is_no_change_of_its_start(model_section: ModelSection, tmp_path: Path) -> None:
    """Its pairs count from the pretrained weights."""
    plain = load_model(model_section, options("kaiming"))
    save_adapter(plain, tmp_path / "peft", {})
    config = run(Path(model_section.base), tmp_path / "peft", options("pissa"))

    with pytest.raises(ConfigError, match=r"start\.adapter lacks"):
        start_of(config, load_model(model_section, options("pissa")))


def test_a_base_model_of_half_precision_is_refused(small_bases: dict[str, Path]) -> None:
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)

    with pytest.raises(ModelError, match=r'q_proj: adapter\.start = "pissa" .* rounded in torch\.bfloat16'):
        load_model(section, options("pissa", targets=("q_proj",)), ComputePolicy(device="cpu", dtype="bfloat16"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_weight_that_the_embeddings_share_is_refused(small_bases: dict[str, Path]) -> None:
    section = ModelSection(base=str(small_bases["gpt2"]), task="causal-lm", max_length=16, head="frozen")

    with pytest.raises(ModelError, match="lm_head shares its weight with the embeddings"):
        load_model(section, options("olora", targets=("lm_head",)))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_rank_above_the_layers_size_is_refused(model_section: ModelSection, start: str) -> None:
    with pytest.raises(ModelError, match=r"query: adapter\.rank = 33 is above"):
        load_model(model_section, options(start, rank=33))


def test_columns_that_determine_no_basis_are_refused() -> None:
    from fedloom.client.adapters.spectral.lora_start import FROM_WEIGHTS

    weight = torch.eye(6)
    weight[:, 1] = weight[:, 0]
    with pytest.raises(ValueError, match="first 2 columns are linearly dependent"):
        FROM_WEIGHTS["olora"](weight, 2, 1.0)
    with pytest.raises(ValueError, match="linearly dependent"):
        FROM_WEIGHTS["olora"](torch.zeros(4, 4), 1, 1.0)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_an_orthogonal_start_has_orthonormal_rows_or_columns(shape: tuple[int, int]) -> None:
    schema = Schema((TensorSpec("a", "m", Role.LORA_A, shape, Start.ORTHOGONAL),))
    drawn, other = (starting_adapter(schema, seed)["a"] for seed in (1, 2))

    assert drawn.shape == shape
    gram = drawn @ drawn.T if shape[0] <= shape[1] else drawn.T @ drawn
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-6)
    assert not np.allclose(drawn, other)
    np.testing.assert_array_equal(drawn, starting_adapter(schema, 1)["a"])


def test_orthogonal_is_the_start_of_every_a(model_section: ModelSection) -> None:
    model = load_model(model_section, options("orthogonal"))
    state = FedAvg().init(model.schema, starting_adapter(model.schema, 3), 3)

    assert len(model.schema.pairs) == 9
    for pair in model.schema.pairs:
        np.testing.assert_allclose(state.adapter[pair.a] @ state.adapter[pair.a].T, np.eye(4), atol=1e-6)
        assert not state.adapter[pair.b].any()
    assert LoRA().start == "kaiming"
