"""The thinner forward pass of a pair beside PEFT's own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.core.config.run import AdapterSection

Build = Callable[..., AdapterModel]


def with_pairs(build_model: Build, **options: object) -> AdapterModel:
    model = build_model(AdapterSection.model_validate({"kind": "lora", "rank": 4, **options}))
    rng = np.random.default_rng(3)
    model.load({spec.name: rng.normal(0, 0.3, spec.shape).astype(np.float32) for spec in model.schema.tensors})
    return model


def thinned(model: AdapterModel) -> list[Linear]:
    """The layers whose forward pass has been replaced."""
    return [layer for layer in model.model.modules() if type(layer) is Linear and "forward" in vars(layer)]


def passed(model: AdapterModel, rows: Rows) -> dict[str, torch.Tensor]:
    """Scores of six rows, and the gradient of every trained tensor."""
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    parameters = model.trainable(model.schema.roles)
    scores = model.logits(batch)
    torch.autograd.backward(torch.nn.functional.cross_entropy(scores, batch["labels"]))
    found = {"scores": scores.detach()}
    for name, parameter in zip(model.slots, parameters, strict=True):
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def by_peft(model: AdapterModel) -> None:
    """Give the layers PEFT's own pass back."""
    for layer in thinned(model):
        del layer.forward


@pytest.mark.parametrize("alpha", [8, 12])
def test_scores_and_gradients_are_pefts_but_for_rounding(build_model: Build, rows: Rows, alpha: float) -> None:
    model = with_pairs(build_model, alpha=alpha)
    assert thinned(model)
    ours = passed(model, rows)
    by_peft(model)
    assert not thinned(model)
    theirs = passed(model, rows)
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-6, msg=name)
    if alpha == 8:  # the scale is 2
        assert torch.equal(theirs["scores"], ours["scores"])


def test_an_adapter_that_is_switched_off_adds_nothing(build_model: Build, rows: Rows) -> None:
    model = with_pairs(build_model)
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(6), model.tokenizer.pad_token_id)
    with torch.inference_mode():
        on = model.logits(batch)
        with model.model.disable_adapter():
            off = model.logits(batch)
        zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in model.schema.tensors if "lora_B" in spec.name}
        model.load(zeros)
        assert not torch.allclose(on, off)
        # The head is trained too, and switched off with the rest, so the layers are compared and not the scores.
        layer = thinned(model)[0]
        x = torch.randn(2, 3, layer.in_features)
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("options", [{"dora": True}, {"start": "pissa"}])
def test_only_doras_layers_are_left_to_peft(build_model: Build, rows: Rows, options: dict[str, object]) -> None:
    model = with_pairs(build_model, **options)
    assert bool(thinned(model)) == ("dora" not in options)
    assert torch.isfinite(passed(model, rows)["scores"]).all()
