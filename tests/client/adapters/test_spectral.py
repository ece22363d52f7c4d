"""LoRA-SB and SVFit against numpy's singular values, and the basis that every process finds alike."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.client.adapters.spectral.basis import leading_singular
from fedloom.client.adapters.wrapping import plain
from fedloom.client.models.load import load_model
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from fedloom.strategies.api import Update
from fedloom.strategies.fedavg import FedAvg
from tests.conftest import make_model

LAYER = "bert.encoder.layer.0.attention.self.query"


def before_and_after(section: ModelSection, adapter: AdapterSection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight as it was and as it is merged, in float64, and the trained values of its layer."""
    model = make_model(section, adapter)
    inner = model.model.get_base_model().get_submodule(LAYER).inner
    weight = plain(inner).weight
    was = weight.detach().double().numpy().copy()
    (values,) = [value for name, value in model.read(model.schema).items() if name.startswith(f"{LAYER}.")]
    model.adapter.merge(model.model)
    return was, weight.detach().double().numpy(), values


def test_lora_sb_adds_s_b_r_a_between_the_singular_vectors(model_section: ModelSection) -> None:
    was, now, core = before_and_after(model_section, AdapterSection(kind="lora-sb", rank=3, alpha=6))

    left, _, right = np.linalg.svd(was)
    signs = np.sign(left[np.abs(left[:, :3]).argmax(0), range(3)])
    expected = 2.0 * (left[:, :3] * signs) @ core @ (right[:3] * signs[:, None])
    np.testing.assert_allclose(now - was, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(now - was), 2.0 * np.linalg.norm(core), rtol=1e-5)


def test_the_mean_core_is_the_mean_of_the_models(model_section: ModelSection) -> None:
    """Fed-SB: sum_k p_k s B R_k A = s B (sum_k p_k R_k) A, over a frozen B and A that all clients share."""
    section = AdapterSection(kind="lora-sb", rank=3, alpha=6)
    strategy, schema = FedAvg(train_head=False), load_model(model_section, section).schema
    state, acc, draw = strategy.init(schema, schema.zeros(), 0), None, np.random.default_rng(2)
    cores, weights = [], (1.0, 2.0, 5.0)
    for index, weight in enumerate(weights):
        plan = strategy.plan(state, 0, str(index))
        delta = {s.name: draw.normal(size=s.shape).astype(np.float32) for s in schema.select(plan.train).tensors}
        cores.append(delta[f"{LAYER}.lora_R"].astype(np.float64))
        acc = strategy.fold(state, acc, Update(str(index), weight, plan.broadcast, delta))
    model = load_model(model_section, section)
    weight_of_layer = plain(model.model.get_base_model().get_submodule(LAYER).inner).weight
    was = weight_of_layer.detach().double().numpy().copy()

    model.load(strategy.commit(state, acc).adapter)
    model.adapter.merge(model.model)

    left, _, right = np.linalg.svd(was)
    signs = np.sign(left[np.abs(left[:, :3]).argmax(0), range(3)])
    models = [2.0 * (left[:, :3] * signs) @ core @ (right[:3] * signs[:, None]) for core in cores]
    expected = np.average(models, axis=0, weights=weights)
    np.testing.assert_allclose(weight_of_layer.detach().double().numpy() - was, expected, atol=1e-6)
    assert np.abs(models[0] - expected).max() > 0.1


def test_svfit_moves_singular_values_and_leaves_singular_vectors(model_section: ModelSection) -> None:
    was, now, change = before_and_after(model_section, AdapterSection(kind="svfit", rank=4))

    left, values, right = np.linalg.svd(was)
    found = np.diag(left.T @ now @ right.T)
    np.testing.assert_allclose(found[:4], values[:4] + change, rtol=1e-5)
    np.testing.assert_allclose(found[4:], values[4:], atol=1e-6)
    np.testing.assert_allclose(left @ np.diag(found) @ right, now, atol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("lora-sb", 16), ("svfit", 4)])
def test_its_size_does_not_depend_on_the_layers(
    model_section: ModelSection, small_bases: dict[str, Path], kind: str, count: int
) -> None:
    for base, targets in ((model_section.base, ("query", "value")), (str(small_bases["llama"]), ("up_proj",))):
        section = model_section.model_copy(update={"base": base})
        schema = load_model(section, AdapterSection(kind=kind, rank=4, targets=targets)).schema
        own = [spec.size for spec in schema.tensors if spec.role != "head"]
        assert own == [count] * (2 * len(targets))


def test_the_basis_does_not_depend_on_how_it_is_computed() -> None:
    """Rows and columns in another order, and another memory layout, take LAPACK another way to other signs."""
    draw = np.random.default_rng(0)
    weight = torch.from_numpy(draw.normal(size=(20, 12)).astype(np.float32))
    left, values, right = leading_singular(weight, 5)

    np.testing.assert_allclose(values.numpy(), np.linalg.svd(weight.numpy())[1][:5], rtol=1e-5)
    assert bool((left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all())
    for _ in range(5):
        rows, columns = draw.permutation(20), draw.permutation(12)
        moved = leading_singular(weight[rows][:, columns].t().contiguous().t(), 5)
        torch.testing.assert_close(moved[0], left[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moved[2], right[:, columns], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.t() @ left, torch.eye(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight", [torch.eye(6), torch.zeros(6, 6), torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0]))])
def test_a_weight_with_equal_singular_values_is_refused(weight: torch.Tensor) -> None:
    """Any rotation of their vectors would do, and every process would have another."""
    with pytest.raises(ValueError, match="two of its 3 largest singular values are equal"):
        leading_singular(weight, 2)


def test_a_rank_above_the_layers_size_is_refused(model_section: ModelSection) -> None:
    with pytest.raises(ModelError, match=r"query: adapter\.rank = 33 is above its 32 singular values"):
        load_model(model_section, AdapterSection(kind="svfit", rank=33))
