"""Each adapter kind on models that the battery's BERT is unlike: transposed weights, and no biases or layer norms."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.exports.loading import load_exported
from fedloom.client.models.exports.result import save_result
from fedloom.client.models.load import load_model
from fedloom.client.policy import ComputePolicy
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.probe import probe
from fedloom.client.training.gradients import batch_loss
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError
from tests.conftest import TARGETS, make_model

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True},
    "pissa": {"kind": "lora", "start": "pissa"},
    "olora": {"kind": "lora", "start": "olora", "rslora": True},
    "ia3": {"kind": "ia3", "feedforward": ("c_fc",)},
    "ssf": {"kind": "ssf"},
    "peqa": {"kind": "peqa"},
    "miss": {"kind": "miss"},
    "lora-sb": {"kind": "lora-sb"},
    "svfit": {"kind": "svfit"},
    "sparse": {"kind": "sparse", "share": 0.2},
    "lift": {"kind": "sparse", "share": 0.2, "mask": "principal"},
    "dsee": {"kind": "dsee"},
    "vera": {"kind": "vera"},
    "hydra": {"kind": "hydra"},
    "dual-lora": {"kind": "dual-lora"},
    "tucker": {"kind": "tucker"},
    "bottleneck": {"kind": "bottleneck", "size": 6},
    "compacter": {"kind": "compacter", "size": 8, "products": 2},
}
FLOAT32 = {"lora-sb", "svfit", "peqa", "sparse", "lift", "dsee", "pissa", "olora"}
"""Kinds that read the base model's weights, which half precision would round."""
BATCH = {
    "input_ids": torch.tensor([[5, 17, 40, 7], [9, 9, 12, 30], [33, 2, 8, 8]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
    "labels": torch.tensor([1, 0, 1]),
}


def options(kind: str, architecture: str) -> AdapterSection:
    values = dict(KINDS[kind])
    if "feedforward" in values:
        values["feedforward"] = tuple(name for name in TARGETS[architecture] if name in ("c_fc", "down_proj"))
    return AdapterSection.model_validate(values | {"rank": 4, "alpha": 4, "targets": TARGETS[architecture]})


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, small_bases: dict[str, Path], kind: str) -> AdapterModel:
    section = ModelSection(base=str(small_bases[request.param]), labels=("no", "yes"), max_length=16)
    return make_model(section, options(kind, request.param))


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_its_result_predicts_the_same(model: AdapterModel, tmp_path: Path) -> None:
    expected = scores(model.model)
    base = Path(model.model.get_base_model().name_or_path)
    plain = load_model(
        ModelSection(base=str(base), labels=("no", "yes"), max_length=16), AdapterSection(kind="head", targets="auto")
    )
    plain.load({name: value for name, value in model.read(model.schema).items() if name in plain.slots})
    assert not torch.allclose(scores(plain.model), expected, atol=1e-2)

    save_result(model, tmp_path / "result", {"run": "r"})

    torch.testing.assert_close(scores(load_exported(base, tmp_path / "result", 2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_of_examples_equal_a_naive_loop(model: AdapterModel) -> None:
    parameters = model.trainable(model.schema.roles)
    alone = []
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in BATCH.items()}
        found = torch.autograd.grad(batch_loss(model, one), parameters)
        alone.append(torch.cat([each.reshape(-1) for each in found]))

    with recording(model.model, parameters) as tape:
        tape.begin(3)
        torch.autograd.backward(batch_loss(model, BATCH))
        tape.finish()

        torch.testing.assert_close(tape.flat, torch.stack(alone), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FLOAT32])
def test_it_trains_on_a_base_model_of_half_precision(small_bases: dict[str, Path], kind: str) -> None:
    """Its own values are float32, the sensitivity probe passes, and scores are the float32 model's but for rounding."""
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)
    whole = make_model(section, options(kind, "llama"))
    half = load_model(section, options(kind, "llama"), ComputePolicy(device="cpu", dtype="bfloat16"))
    half.load(whole.read(whole.schema))

    assert {slot.parameter.dtype for slot in half.slots.values()} == {torch.float32}
    torch.testing.assert_close(scores(half.model).float(), scores(whole.model), rtol=0.1, atol=0.1)
    probe(half, partial(batch_loss, half), 16)
    assert half.probed


@pytest.mark.parametrize("kind", sorted(FLOAT32))
def test_it_says_that_it_needs_float32(small_bases: dict[str, Path], kind: str) -> None:
    section = ModelSection(base=str(small_bases["llama"]), labels=("no", "yes"), max_length=16)

    with pytest.raises(ModelError, match=r"needs all of it in float32|rounded in torch\.bfloat16"):
        load_model(section, options(kind, "llama"), ComputePolicy(device="cpu", dtype="bfloat16"))
