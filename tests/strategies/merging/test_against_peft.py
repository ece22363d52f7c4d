"""Merging in float64 against PEFT's `add_weighted_adapter`, where both do the same.

PEFT's "linear", "ties", "dare_linear" and "magnitude_prune" act on the factors A and B one by one and give another
model than their papers; "cat" and those that end in "svd" act on products, as ours do.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedloom.strategies.merging.adapter import FinishedAdapter, Float64, Product
from fedloom.strategies.merging.merge import Rank, merge
from fedloom.strategies.merging.methods.api import Method, places
from fedloom.strategies.merging.methods.breadcrumbs import Breadcrumbs
from fedloom.strategies.merging.methods.dare import Dare
from fedloom.strategies.merging.methods.soup import Soup
from fedloom.strategies.merging.methods.task_arithmetic import TaskArithmetic
from fedloom.strategies.merging.methods.ties import Ties

CONFIGS = {"one": (3, 6.0), "two": (2, 5.0), "three": (4, 4.0)}
LAYERS = ("h.0", "h.1")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    base = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(10, 14), nn.Linear(14, 9)])}).double()
    made: PeftModel | None = None
    for name, (rank, alpha) in CONFIGS.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"])
        if made is None:
            made = get_peft_model(base, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    for key, parameter in made.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return made.double()


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


def adapters_of(model: Any) -> list[FinishedAdapter]:
    def product(name: str, adapter: str) -> Product:
        here = layer(model, name)
        rank, alpha = CONFIGS[adapter]
        b, a = here.lora_B[adapter].weight, here.lora_A[adapter].weight
        assert b.dtype == torch.float64
        return Product(alpha / rank * b.detach().numpy(), a.detach().numpy())

    return [FinishedAdapter({name: product(name, adapter) for name in LAYERS}, {}) for adapter in CONFIGS]


def theirs(model: Any, weights: list[float], kind: str, **options: Any) -> dict[str, Float64]:
    model.add_weighted_adapter(list(CONFIGS), weights, "merged", kind, **options)
    return {name: layer(model, name).get_delta_weight("merged").detach().numpy() for name in LAYERS}


# PEFT keeps the weights in float32: these are exact there.
WEIGHTS = [0.5, 0.25, 0.25]


def compare(model: Any, method: Method, weights: list[float], rank: Rank | None, kind: str, **options: Any) -> None:
    ours = merge(adapters_of(model), method, weights, rank)
    for name, expected in theirs(model, weights, kind, **options).items():
        np.testing.assert_allclose(ours.adapter.products[name].dense(), expected, rtol=0, atol=1e-10)
        assert np.abs(expected).max() > 0.5


def test_a_soup_is_cat(model: Any) -> None:
    compare(model, Soup(), WEIGHTS, None, "cat")


@pytest.mark.parametrize("rank", [2, 5])
def test_a_truncated_soup_is_svd(model: Any, rank: int) -> None:
    compare(model, Soup(), WEIGHTS, Rank(rank), "svd", svd_rank=rank)


def test_linear_is_ours_of_one_adapter_and_another_model_of_two(model: Any) -> None:
    """It adds up A and B by the roots of weight and scale: of one adapter that is exact, of two the factors mix."""
    model.add_adapter("four", LoraConfig(r=4, lora_alpha=4.0, target_modules=["0", "1"]))
    for key, parameter in model.named_parameters():
        if ".four." in key:
            nn.init.normal_(parameter)
    model.double()
    model.add_weighted_adapter(["three"], [0.25], "alone", "linear")
    model.add_weighted_adapter(["three", "four"], [0.25, 0.25], "both", "linear")

    ours = merge(adapters_of(model), TaskArithmetic(1.0), [0.0, 0.0, 0.25]).adapter

    for name in LAYERS:
        three, four, alone, both = (
            layer(model, name).get_delta_weight(each).detach().numpy() for each in ("three", "four", "alone", "both")
        )
        np.testing.assert_allclose(ours.products[name].dense(), alone, rtol=0, atol=1e-10)
        assert np.abs(alone).max() > 0.5
        assert np.abs(both - 0.25 * (three + four)).max() > 0.5


def test_task_arithmetic_is_svd_with_weights_of_any_sign(model: Any) -> None:
    compare(model, TaskArithmetic(1.0), [1.0, -0.5, 2.0], Rank(4), "svd", svd_rank=4)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_with_equal_weights(model: Any, density: float) -> None:
    """With others PEFT elects signs without weights and divides by a count; ours are weighted throughout."""
    compare(model, Ties(density), [1.0, 1.0, 1.0], Rank(6), "ties_svd", svd_rank=6, density=density)


def test_breadcrumbs_that_keep_outliers_are_magnitude_pruning(model: Any) -> None:
    method = Breadcrumbs(smallest=0.5, largest=0.0, scaling=1.0)

    compare(model, method, WEIGHTS, Rank(5), "magnitude_prune_svd", svd_rank=5, density=0.5)


def test_dare_with_the_same_entries_dropped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Dare(density=0.5, scaling=1.0, seed=3)

    def masks() -> Iterator[torch.Tensor]:
        for name, place in places(LAYERS).items():
            shape = tuple(layer(model, name).weight.shape)
            for adapter in range(len(CONFIGS)):
                yield torch.from_numpy(method.mask(shape, place, adapter)).double()

    drawn = masks()
    monkeypatch.setattr(torch, "bernoulli", lambda input: next(drawn))

    compare(model, method, WEIGHTS, Rank(6), "dare_linear_svd", svd_rank=6, density=0.5)

    assert next(drawn, None) is None
