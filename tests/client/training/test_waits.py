"""A private step asks the device for nothing, so that a GPU never stands still until the CPU has read a value."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models import adapter_model
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.grad_sample import hooked, recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.gradients import batch_loss
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.schema import Role
from tests.client.dp_sgd.test_private_step import examples, network
from tests.client.rounds import assignment, start
from tests.client.training.test_tasks import CASES, rows_of
from tests.support.waits import Waits, no_waits

Build = Callable[..., AdapterModel]


@pytest.mark.parametrize("bands", [1, 2])
def test_a_private_round_waits_for_nothing(
    bands: int, tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, tmp_path: Path
) -> None:
    """Samples and draws are the host's; microbatches are filled up, and their copies are left out."""
    chosen = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"noise_bands": bands})})
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        trainer = Trainer(tiny_model, rows, chosen, policy, ledger, entropy_for=lambda number: Seeded(7, number))
        with no_waits():
            trainer.train("run", assignment(), start(tiny_model))


@pytest.mark.parametrize("by", [recording, hooked])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_no_example_makes_the_sum_wait(value: float, by: Callable[..., Any]) -> None:
    """Gradients that are formed and those that are factors, finite or not."""
    model, data = network(), examples(5)
    data[1] *= value
    parameters = list(model.parameters())
    with by(model, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.1)
        optimizer = PrivateOptimizer(base, tape, Seeded(1), noise_multiplier=1.0, clip_norm=1.0, expected_batch=5)
        with no_waits():
            tape.begin(5)
            torch.autograd.backward(model(data).square().sum())
            optimizer.accumulate(4)
            optimizer.release()
    assert all(bool(each.grad.isfinite().all()) for each in parameters if each.grad is not None)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_no_model_waits(architecture: str, task: str, padded: bool, build_task: Build) -> None:
    model = build_task(architecture, task)
    encoded = encode(rows_of(task), model.tokenizer, 24)
    chosen = np.arange(5) if padded else np.zeros(5, np.int64)
    parameters = model.trainable({Role.LORA_A, Role.LORA_B})
    with recording(model.model, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.1)
        optimizer = PrivateOptimizer(base, tape, Seeded(1), noise_multiplier=1.0, clip_norm=1.0, expected_batch=5)
        batch = collate(encoded, chosen, model.tokenizer.pad_token_id)
        with no_waits():
            tape.begin(5)
            torch.autograd.backward(batch_loss(model, batch))
            optimizer.accumulate(4)
            optimizer.release()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_scores_are_those_of_a_mask_that_is_looked_at(
    architecture: str, task: str, padded: bool, build_task: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and by the same kernels: without a mask where nothing is padded."""
    model = build_task(architecture, task)
    encoded = encode(rows_of(task), model.tokenizer, 24)
    chosen = np.arange(5) if padded else np.zeros(5, np.int64)
    batch = collate(encoded, chosen, model.tokenizer.pad_token_id)
    masks: list[bool] = []
    attention: Any = F.scaled_dot_product_attention

    def noting(*given: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: object) -> torch.Tensor:
        masks.append(attn_mask is not None)
        result: torch.Tensor = attention(*given, attn_mask=attn_mask, **options)
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    with torch.no_grad():
        found = model.logits(batch)
        monkeypatch.setattr(adapter_model, "padding_known", lambda _: contextlib.nullcontext())
        with Waits() as waits:
            expected = model.logits(batch)

    assert torch.equal(found, expected)
    assert masks == [padded] * 4, "two layers, twice"
    assert waits.found, "or this looks at nothing"


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: bool((values > 0).all()),
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: torch.nonzero(values),
        lambda values: values.masked_select(values > 0),
        lambda values: values.index_put_((values > 0,), torch.tensor(0.0)),
    ],
)
def test_what_waits_is_seen(wait: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError), no_waits():
        wait(torch.ones(3))
