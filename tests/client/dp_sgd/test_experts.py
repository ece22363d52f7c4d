"""Mixtures of experts: attention trains, routers, experts and models whose experts have a limit are refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.head import Head
from fedloom.client.adapters.lora import LoRA, linear_targets
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording, routers
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from tests.families import FAMILIES, MIXTURES, save_family


class Mixture(nn.Module):
    """Two experts behind a router that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def loaded(family: str, folder: Path) -> AdapterModel:
    section = ModelSection(base=str(save_family(family, folder)), task="causal-lm", head="frozen", max_length=16)
    return load_model(section, AdapterSection(rank=2, alpha=4))


def switch() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    experts = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes, **experts))


def with_pairs(**options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model: nn.Module = LoRA(rank=2, **options).attach(Host(switch(), Head(), None))
        return model


def named(model: nn.Module, mark: str) -> nn.Parameter:
    """The first parameter whose name has `mark` in it, trained."""
    found = next(parameter for name, parameter in model.named_parameters() if mark in name)
    found.requires_grad = True
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_a_router_is_not_trained_privately(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path).model

    with (
        pytest.raises(ModelError, match=r"mlp\.gate\.weight' is of a mixture-of-experts router.* leave the router out"),
        recording(model, [named(model, "mlp.gate.weight")]),
    ):
        pass


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_is_not_trained_privately(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path).model

    with (
        pytest.raises(
            ModelError, match=r'is of an expert, which sees the tokens of all.* set adapter\.targets = "auto"'
        ),
        recording(model, [named(model, ".experts.")]),
    ):
        pass


@pytest.mark.parametrize(("mark", "what"), [("gate", "router"), ("experts", "is of an expert")])
def test_experts_are_known_by_their_name_where_transformers_does_not_know_them(mark: str, what: str) -> None:
    model = Mixture()

    assert routers(model) == ("gate",)
    with pytest.raises(ModelError, match=what), recording(model, [named(model, mark)]):
        pass
    with recording(model, [named(model, "attention.weight")]) as tape:
        tape.begin(3)
        model.attention(torch.ones(3, 4)).sum().backward()
        tape.finish()
        assert tape.flat.shape == (3, 16)


def test_a_gate_without_experts_is_a_layer_like_any_other() -> None:
    assert routers(nn.ModuleDict({"gate": nn.Linear(4, 2)})) == ()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MIXTURES.keys()))
def test_other_families_have_no_router(family: str) -> None:
    assert routers(FAMILIES[family]()) == ()


def test_a_model_whose_experts_have_a_limit_is_not_trained_privately() -> None:
    model = with_pairs()

    with (
        pytest.raises(ModelError, match=r"mlp\.router' take a limited number of tokens.* take a model without a limit"),
        recording(model, [named(model, "SelfAttention.q.lora_A")]),
    ):
        pass


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_no_router_gets_a_pair(targets: str) -> None:
    base = switch()

    names = linear_targets(base, targets, Head())  # type: ignore[arg-type]  # one of the two words

    assert names
    assert len(routers(base)) == 2
    assert isinstance(base.get_submodule(f"{routers(base)[0]}.classifier"), nn.Linear)
    assert not any("router" in name for name in names)


def test_a_router_that_is_named_gets_a_pair_and_no_private_run() -> None:
    model = with_pairs(targets=("classifier",))

    with (
        pytest.raises(ModelError, match="is of a mixture-of-experts router"),
        recording(model, [named(model, "classifier.lora_A")]),
    ):
        pass
