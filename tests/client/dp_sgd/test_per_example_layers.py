"""The tape, the recorded layers one by one, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedloom.client.privacy.dp_sgd.grad_sample import Tape, hooked, recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.core.errors import ModelError


def naive(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of a loss that no layer norm makes constant, one example at a time; shape (batch, P)."""
    rows = []
    for each in x:
        grads = torch.autograd.grad(layer(each[None]).pow(3).sum(), list(layer.parameters()))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def taped(layer: nn.Module, x: torch.Tensor, by: Callable[..., object] = recording) -> torch.Tensor:
    with by(layer, list(layer.parameters())) as tape:  # type: ignore[attr-defined]  # a context manager
        tape.begin(len(x))
        torch.autograd.backward(layer(x).pow(3).sum())
        tape.finish()
        return tape.flat  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["linear", "conv1d", "layer_norm"]),
    st.integers(1, 4),
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(2, 5),
    st.integers(1, 5),
)
def test_every_layer_equals_a_naive_loop(kind: str, batch: int, middle: list[int], columns: int, rows: int) -> None:
    torch.manual_seed(0)
    made = {"linear": nn.Linear(columns, rows), "conv1d": Conv1D(rows, columns), "layer_norm": nn.LayerNorm(columns)}
    layer = made[kind]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(batch, *middle, columns)

    expected = naive(layer, x)

    torch.testing.assert_close(taped(layer, x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1, 2, 3, 50])
def test_formed_and_factored_gradients_give_the_same_norms_and_sums(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    [weight] = nn.Linear(8, 6, bias=False).parameters()
    left, right = torch.randn(5, tokens, 6, generator=generator), torch.randn(5, tokens, 8, generator=generator)
    dense = torch.stack([a.t() @ b for a, b in zip(left, right, strict=True)])
    tape, weights, total = Tape([weight]), 1e4 * torch.rand(5, generator=generator), torch.zeros(48, dtype=torch.int64)

    tape.begin(5)
    tape.add_product(weight, left, right)
    tape.add_rounded_sum(weights, total)

    assert bool(tape._formed) == (tokens * (6 + 8) >= 48)
    torch.testing.assert_close(tape.gradient(weight), dense)
    torch.testing.assert_close(tape.norms(), dense.flatten(1).norm(dim=1))
    rounded = (weights[:, None, None] * dense).double().round().sum(0).flatten()
    assert (total - rounded).abs().max() <= 1  # where a product in float32 falls on the other side of a half


def test_a_factored_layer_used_twice_adds_both_uses_before_its_norm() -> None:
    """Norms of the two uses cannot be combined: their gradients may cancel."""
    [weight] = nn.Linear(30, 30, bias=False).parameters()
    left, right = torch.randn(4, 1, 30), torch.randn(4, 1, 30)
    tape = Tape([weight])

    tape.begin(4)
    tape.add_product(weight, left, right)
    tape.add_product(weight, -left, right)

    assert tape.norms().max() < 1e-3
    assert tape.gradient(weight).abs().max() < 1e-5


def test_factors_are_formed_when_they_outgrow_the_product() -> None:
    layer = nn.Linear(6, 6, bias=False)
    [weight] = layer.parameters()
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))

    def four_uses(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = layer(x)
        return x

    with recording(layer, [weight]) as tape:
        tape.begin(3)
        torch.autograd.backward(four_uses(x).square().sum())
        tape.finish()

    expected = torch.stack([torch.autograd.grad(four_uses(each[None]).square().sum(), weight)[0] for each in x])
    torch.testing.assert_close(tape.gradient(weight), expected, rtol=1e-4, atol=1e-5)


def test_what_the_tape_keeps_has_no_history() -> None:
    """A kept input with its history would keep every activation of the step alive."""
    layer = nn.Linear(20, 20)
    x = torch.randn(2, 20, requires_grad=True)
    with recording(layer, list(layer.parameters())) as tape:
        tape.begin(2)
        torch.autograd.backward(layer(x * 2).square().sum())

    assert not tape.flat.requires_grad
    assert not tape.norms().requires_grad


def test_stock_opacus_optimizer_takes_what_the_tape_publishes() -> None:
    layer = nn.Linear(9, 9)
    parameters = list(layer.parameters())
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    results = []
    for stock in (True, False):
        torch.manual_seed(0)
        layer.reset_parameters()
        base = torch.optim.SGD(parameters, lr=0.5)
        with recording(layer, parameters) as tape:
            settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.7, "expected_batch_size": 4}
            reference = DPOptimizer(base, **settings)
            ours = PrivateOptimizer(base, tape, Seeded(1), noise_multiplier=0.0, clip_norm=0.7, expected_batch=4)
            tape.begin(6)
            torch.autograd.backward(layer(x).square().sum())
            if stock:
                tape.publish()
                reference.step()
            else:
                ours.accumulate()
                ours.release()
        assert layer.weight.grad_sample is None  # type: ignore[attr-defined]  # Opacus's
        results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))

    # Rounding to the grid moves each of six examples by at most half of 0.7 / 2^20, before a step of 0.5 / 4.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)


HOOKED_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), (5, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2, padding=1), (5, 2, 4, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (5, 4, 6)),
    "layer_norm": (lambda: nn.LayerNorm(6), (5, 3, 6)),
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
}


@pytest.mark.parametrize("kind", HOOKED_LAYERS)
@pytest.mark.parametrize("batch", [5, 1])
def test_a_kind_that_goes_through_opacus_hooks_equals_a_naive_loop(kind: str, batch: int) -> None:
    make, shape = HOOKED_LAYERS[kind]
    torch.manual_seed(0)
    layer = make().eval()
    x = torch.randn(shape)[:batch]
    expected = naive(layer, x)

    fast = taped(layer, x, hooked)

    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert not layer.training


def test_recording_uses_hooks_where_a_trained_layer_is_one_only_they_know() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(5, 3, 6)
    expected = naive(model, x)

    for _ in range(2):  # the hooks come off
        assert_close = torch.testing.assert_close
        assert_close(taped(model, x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_hooks_need_everything_else_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    with pytest.raises(ModelError, match=r"'1.weight' requires gradients"), hooked(model, list(model[0].parameters())):
        pass


def test_hooks_that_saw_another_number_of_rows_are_refused() -> None:
    """Prompt tuning: one row of gradient for the whole batch, clipped as if it were one example's."""
    layer = nn.Linear(3, 3)

    with hooked(layer, list(layer.parameters())) as tape:
        tape.begin(4)
        torch.autograd.backward((layer(torch.ones(1, 3)) * torch.ones(4, 3)).sum())
        with pytest.raises(ModelError, match="'weight' saw 1 rows for 4 of the batch"):
            tape.finish()


def tiny_bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))


REFUSED = {
    "embedding": (LoraConfig(r=2, target_modules=["word_embeddings"]), "out of adapter.targets"),
    "dora": (LoraConfig(r=2, target_modules=["query"], use_dora=True), "without DoRA"),
    "ia3": (IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS"), "IA3.*adapter kind ia3"),
    "prompt": (PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), "prompt tokens.*use LoRA"),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("by", [recording, hooked])
def test_an_adapter_without_exact_gradients_is_refused_with_the_remedy(kind: str, by: Callable[..., object]) -> None:
    if kind == "dora" and by is recording:
        return  # its gradients are those of a loop, see the battery of adapter kinds
    config, remedy = REFUSED[kind]
    model = get_peft_model(tiny_bert(), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    with pytest.raises(ModelError, match=f"has no per-example gradient here; .*{remedy}"), by(model, parameters):  # type: ignore[attr-defined]
        pass


class Renamed(nn.Linear):
    """Might compute anything."""


@pytest.mark.parametrize(
    ("layer", "remedy"),
    [
        (nn.Embedding(3, 3), "leave the table frozen"),
        (nn.MultiheadAttention(2, 1), "train linear layers"),
        (Renamed(3, 3), r"\(Renamed\).*train linear layers"),
        (nn.BatchNorm1d(3), "mixes examples; use a model with layer norm"),
        (nn.BatchNorm1d(3).eval(), "mixes the examples of a batch: use a model with layer norm"),
    ],
)
def test_a_layer_that_is_not_listed_is_refused_by_name(layer: nn.Module, remedy: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "odd": layer})

    with pytest.raises(ModelError, match=rf"layer 'odd' .*{remedy}"), recording(model, list(model.parameters())):
        pass

    assert "forward" not in model["first"].__dict__


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()])
def test_frozen_batch_norm_that_looks_at_the_batch_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer.requires_grad_(False))

    with pytest.raises(ModelError, match="mixes examples"), recording(model, list(model[0].parameters())):
        pass


def test_a_matrix_tied_to_an_embedding_is_refused() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    table = model["table"]
    assert isinstance(table, nn.Embedding)
    table.weight = model["head"].weight  # type: ignore[assignment]  # a parameter, of a Linear

    with pytest.raises(ModelError, match="'table'"), recording(model, list(model["head"].parameters())):
        pass


def test_a_parameter_of_another_model_is_refused() -> None:
    with (
        pytest.raises(ModelError, match=r"belong to no layer.*shape \(2, 3\)"),
        recording(nn.Linear(4, 4), list(nn.Linear(3, 2).parameters())),
    ):
        pass


def test_a_weight_used_outside_its_layer_is_refused() -> None:
    layer = nn.Linear(3, 3)

    with recording(layer, list(layer.parameters())) as tape:
        tape.begin(2)
        torch.autograd.backward(F.linear(layer(torch.ones(2, 3)), layer.weight).sum())
        with pytest.raises(ModelError, match="used outside their layer's own forward, such as 'weight'"):
            tape.finish()


def test_a_parameter_that_is_not_on_the_tape_is_left_to_autograd() -> None:
    layer = nn.Linear(3, 2)
    weight, bias = layer.parameters()

    with recording(layer, [bias]) as tape:
        tape.begin(4)
        torch.autograd.backward(layer(torch.ones(4, 3)).sum())
        tape.finish()

    assert torch.equal(tape.flat, torch.ones(4, 2))
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((2, 3), 4.0))


def test_a_layer_that_sees_the_batch_flattened_is_refused() -> None:
    layer = nn.Linear(3, 3)

    with recording(layer, list(layer.parameters())) as tape:
        tape.begin(2)
        with pytest.raises(ModelError, match="saw 8 rows for 2 of the batch"):
            torch.autograd.backward(layer(torch.ones(2, 4, 3).flatten(0, 1)).sum())
