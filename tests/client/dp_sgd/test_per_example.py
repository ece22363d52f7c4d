"""Per-example gradients against a naive loop and against Opacus's own hooks."""

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.core.config.run import AdapterSection
from fedloom.core.errors import ModelError
from fedloom.core.schema import Role

KINDS = {
    "lora": (AdapterSection(rank=4, alpha=8), (Role.LORA_A, Role.LORA_B, Role.HEAD)),
    "lora-all-linear": (
        AdapterSection(rank=4, targets=("query", "key", "value", "dense")),
        (Role.LORA_A, Role.LORA_B, Role.HEAD),
    ),
    "lora-B-only": (AdapterSection(rank=4), (Role.LORA_B,)),
    "bias": (AdapterSection(kind="bias"), (Role.BIAS, Role.HEAD)),
    "head": (AdapterSection(kind="head"), (Role.HEAD,)),
}


def sum_loss(model: AdapterModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model.logits(batch), batch["labels"], reduction="sum")


def naive_gradients(
    model: AdapterModel, parameters: list[nn.Parameter], batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """One backward pass per example, the padding of the batch kept; shape (batch, P)."""
    rows = []
    for i in range(len(batch["labels"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        grads = torch.autograd.grad(sum_loss(model, one), parameters)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def recorded_gradients(
    model: AdapterModel, parameters: list[nn.Parameter], batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    with recording(model.model, parameters) as tape:
        tape.begin(len(batch["labels"]))
        torch.autograd.backward(sum_loss(model, batch))
        tape.finish()
        return tape.flat


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_naive_loop(kind, build_model, rows: Rows) -> None:  # type: ignore[no-untyped-def]
    adapter, roles = KINDS[kind]
    model = build_model(adapter)
    parameters = model.trainable(roles)
    batch = collate(encode(rows, model.tokenizer, 16), np.arange(7), model.tokenizer.pad_token_id)

    fast = recorded_gradients(model, parameters, batch)

    naive = naive_gradients(model, parameters, batch)
    assert naive.abs().max() > 1e-3
    torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5 * float(naive.abs().max()))


def test_leaves_no_trace_on_the_model(tiny_model: AdapterModel, rows: Rows) -> None:
    parameters = tiny_model.trainable((Role.LORA_A, Role.LORA_B, Role.HEAD))
    batch = collate(encode(rows, tiny_model.tokenizer, 16), np.arange(4), tiny_model.tokenizer.pad_token_id)
    before = torch.autograd.grad(sum_loss(tiny_model, batch), parameters)

    recorded_gradients(tiny_model, parameters, batch)

    after = torch.autograd.grad(sum_loss(tiny_model, batch), parameters)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(p.grad_sample is None for p in parameters)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # raised by the reference
def test_clipped_step_equals_opacus_without_noise(tiny_model: AdapterModel, rows: Rows) -> None:
    batch = collate(encode(rows, tiny_model.tokenizer, 16), np.arange(9), tiny_model.tokenizer.pad_token_id)
    parameters = tiny_model.trainable((Role.LORA_A, Role.LORA_B, Role.HEAD))
    clip = float(naive_gradients(tiny_model, parameters, batch).norm(dim=1).median())
    start = [p.detach().clone() for p in parameters]

    tiny_model.model.train()
    hooks = GradSampleHooks(tiny_model.model, loss_reduction="sum", strict=False)
    reference = DPOptimizer(
        torch.optim.SGD(parameters, lr=0.5), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=8
    )
    torch.autograd.backward(sum_loss(tiny_model, batch))
    reference.step()
    hooks.cleanup()
    tiny_model.model.eval()
    expected = [p.detach().clone() for p in parameters]

    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    with recording(tiny_model.model, parameters) as tape:
        ours = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.5),
            tape,
            Seeded(1),
            noise_multiplier=0.0,
            clip_norm=clip,
            expected_batch=8,
        )
        for part in (slice(0, 4), slice(4, 9)):  # microbatches must not change the step
            piece = {name: value[part] for name, value in batch.items()}
            tape.begin(len(piece["labels"]))
            torch.autograd.backward(sum_loss(tiny_model, piece))
            ours.accumulate()
        ours.release()

    moved = max(float((e - s).abs().max()) for e, s in zip(expected, start, strict=True))
    assert moved > 1e-3
    for parameter, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=2e-6 * max(1.0, moved))


def test_a_shared_layer_adds_both_uses() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    parameters = list(layer.parameters())

    with recording(layer, parameters) as tape:
        tape.begin(4)
        torch.autograd.backward(layer(layer(x)).square().sum())
        tape.finish()
        fast = tape.gradient(parameters[0])
        expected = torch.stack(
            [
                torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]  # torch's
                    lambda w, i=i: F.linear(F.linear(x[i], w, layer.bias), w, layer.bias).square().sum(),
                    layer.weight.detach(),
                )
                for i in range(4)
            ]
        )
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)


def test_unsupported_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    with (
        pytest.raises(ModelError, match=r"'1' \(BatchNorm1d\) normalises over the batch"),
        recording(model, list(model.parameters())),
    ):
        pass

    assert "forward" not in model[0].__dict__


def test_a_layer_that_sees_no_examples_axis_is_refused() -> None:
    prompt = nn.Linear(3, 3)

    with recording(prompt, list(prompt.parameters())) as tape:
        tape.begin(4)
        with pytest.raises(ModelError, match="mixes examples"):
            torch.autograd.backward((prompt(torch.ones(1, 3)) * torch.ones(4, 3)).sum())


def test_a_parameter_the_forward_skips_is_reported() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})

    with recording(model, list(model.parameters())) as tape:
        tape.begin(3)
        torch.autograd.backward(model["used"](torch.ones(3, 2)).sum())
        with pytest.raises(ModelError, match="2 trained parameters got no gradient"):
            tape.finish()
