"""Per-example gradients of real architectures against a naive loop and against Opacus's own hooks."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from fedloom.client.adapters.api import Host
from fedloom.client.adapters.head import Head
from fedloom.client.adapters.lora import LoRA
from fedloom.client.privacy.dp_sgd.grad_sample import LAYERS, Tape, hooked, recording, scale
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import deviation, longest

Batch = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {"vocab_size": 60, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def bert() -> nn.Module:
    sizes = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(initializer_range=0.1, **sizes, **no_dropout))  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    sizes = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2ForSequenceClassification(GPT2Config(initializer_range=0.1, **sizes, **no_dropout))  # type: ignore[no-any-return]


def llama() -> nn.Module:
    sizes = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return LlamaForSequenceClassification(LlamaConfig(initializer_range=0.1, **sizes))  # type: ignore[no-any-return]


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bert": (bert, ("query", "key", "value", "dense")),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc")),
    "llama": (llama, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}

KINDS: dict[str, Callable[[str], bool]] = {
    "pairs-and-head": lambda name: "lora_" in name or "modules_to_save" in name,
    "B-only": lambda name: "lora_B" in name,
    "biases-and-norms": lambda name: name.endswith(".bias") or "LayerNorm" in name or ".ln_" in name,
    # Matrices larger than their inputs, which the tape keeps as factors.
    "whole-matrices": lambda name: (
        name.endswith(("self.query.base_layer.weight", "attn.c_attn.base_layer.weight"))
        or name.endswith("q_proj.base_layer.weight")
        or "modules_to_save" in name
    ),
}

CASES = [(family, kind) for family in FAMILIES for kind in KINDS if (family, kind) != ("llama", "biases-and-norms")]


def build(family: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[nn.Parameter]]:
    """A tiny model with a random adapter, and the trained parameters."""
    make, targets = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = LoRA(rank=3, targets=targets).attach(Host(make().to(dtype), Head(), "SEQ_CLS")).eval()
    parameters = []
    for name, parameter in model.named_parameters():
        chosen = KINDS[kind](name) and ".original_module." not in name
        parameter.requires_grad_(chosen)
        if "lora_" in name or name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.2)
        if chosen:
            parameters.append(parameter)
    return model, parameters


def ragged(batch: int = 5, length: int = 7) -> Batch:
    """Rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1, 60, (batch, length), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (batch,), generator=generator),
    }


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")


def naive(model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> torch.Tensor:
    """One backward pass for each example, with the padding of the batch; shape (batch, P)."""
    rows = []
    for i in range(len(batch["labels"])):
        grads = torch.autograd.grad(loss(model, {name: value[i : i + 1] for name, value in batch.items()}), parameters)
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def taped(model: nn.Module, parameters: list[nn.Parameter], batch: Batch, by: Any = recording) -> torch.Tensor:
    with by(model, parameters) as tape:
        tape.begin(len(batch["labels"]))
        torch.autograd.backward(loss(model, batch))
        tape.finish()
        return tape.flat  # type: ignore[no-any-return]


def assert_same(fast: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    largest = float(reference.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(fast, reference.float(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_of_ragged_examples_equal_a_naive_loop(family: str, kind: str) -> None:
    model, parameters = build(family, kind)

    for batch in (ragged(), ragged(1), ragged(3, 2)):
        assert_same(taped(model, parameters, batch), naive(model, parameters, batch))


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case != ("gpt2", "biases-and-norms")])
def test_gradients_equal_those_of_opacus_hooks(family: str, kind: str) -> None:
    model, parameters = build(family, kind)
    if (family, kind) == ("gpt2", "whole-matrices"):
        with pytest.raises(ModelError, match="Conv1D"):
            taped(model, parameters, ragged(), hooked)
        return

    assert_same(taped(model, parameters, ragged()), taped(model, parameters, ragged(), hooked), 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_base_gives_float32_gradients(family: str) -> None:
    model, parameters = build(family, "pairs-and-head", torch.bfloat16)
    pairs = [each for each in parameters if each.dtype == torch.float32]
    assert len(pairs) in (len(parameters) - 1, len(parameters) - 2)  # the head keeps the base's precision

    fast = taped(model, parameters, ragged())

    assert fast.dtype == torch.float32
    assert_same(fast, taped(model, parameters, ragged(), hooked), 1e-2)
    for parameter in parameters:
        parameter.requires_grad_(parameter.dtype == torch.float32)
    assert_same(taped(model, pairs, ragged()), taped(model, pairs, ragged(), hooked))
    assert_same(taped(model, pairs, ragged()), naive(model, pairs, ragged()), 0.1)  # bfloat16 has 8 bits


def checkpointed(model: Any, *, reentrant: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method's later name is not in every transformers 5
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_checkpointing_changes_no_gradient(family: str, kind: str, reentrant: bool) -> None:
    model, parameters = build(family, kind)
    expected = naive(model, parameters, ragged())
    checkpointed(model, reentrant=reentrant)
    layer = next(
        module for module in model.modules() if "lora" in type(module).__module__ and hasattr(module, "lora_A")
    )
    calls: list[object] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(None))

    fast = taped(model, parameters, ragged())

    assert len(calls) == 2  # once forward, once again in the backward pass
    assert_same(fast, expected)


def test_hooks_are_refused_where_they_miss_the_recomputed_layers() -> None:
    model, parameters = build("bert", "B-only")
    checkpointed(model, reentrant=False)

    with pytest.raises(ModelError, match="got no gradient"):
        taped(model, parameters, ragged(), hooked)


def test_reentrant_checkpointing_without_input_gradients_is_refused() -> None:
    model, parameters = build("bert", "pairs-and-head")
    checkpointed(model, reentrant=True)
    model.get_submodule("base_model.model").disable_input_require_grads()  # type: ignore[operator]  # PreTrainedModel's

    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(ModelError, match="enable_input_require_grads"),
    ):
        taped(model, parameters, ragged())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_example_leaves_the_others_gradients_as_they_are_to_the_bit(family: str) -> None:
    model, parameters = build(family, "pairs-and-head")
    batch = ragged()
    before = taped(model, parameters, batch)
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][2] = changed["input_ids"][2].flip(0).clamp(min=1)
    changed["attention_mask"][2] = 1
    changed["labels"][2] = (changed["labels"][2] + 1) % 3

    after = taped(model, parameters, changed)

    others = torch.arange(5) != 2
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[2], after[2])


def rms_norm(module: Any, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    normalised = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + module.variance_epsilon)
    return scale(normalised.to(x.dtype), module.weight, tape)


def test_a_kind_of_layer_is_added_by_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model, parameters = build("llama", "pairs-and-head")
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    for norm in norms:
        norm.requires_grad_(True)
    known = type(model.get_submodule("base_model.model.model.norm"))
    kind = type("OwnNorm", (known,), {})
    for module in model.modules():
        if type(module) is known:
            module.__class__ = kind
    with pytest.raises(ModelError, match=r"input_layernorm' \(OwnNorm\).*train linear layers"):
        taped(model, parameters + norms, ragged())

    monkeypatch.setitem(LAYERS, kind, rms_norm)

    both = parameters + norms
    assert_same(taped(model, both, ragged()), naive(model, both, ragged()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_the_adapter_by_rate_times_update_and_nothing_else(family: str) -> None:
    model, parameters = build(family, "pairs-and-head")
    trained = set(parameters)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    start = [parameter.detach().clone() for parameter in parameters]
    gradients = naive(model, parameters, ragged())
    clip = float(gradients.norm(dim=1).median())
    with recording(model, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.5), tape, Seeded(3), noise_multiplier=0.8, clip_norm=clip, expected_batch=4
        )
        tape.begin(5)
        torch.autograd.backward(loss(model, ragged()))
        optimizer.accumulate()
        optimizer.release()

    clipped = (gradients * (clip / gradients.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    noise = torch.from_numpy(Seeded(3).normal(deviation(0.8), len(clipped)) / longest(len(clipped))).float() * clip
    moved = torch.cat([(p.detach() - s).reshape(-1) for p, s in zip(parameters, start, strict=True)])
    expected = -0.5 * (clipped + noise) / 4
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in trained}
    for name, value in model.state_dict().items():
        assert (name in names) != torch.equal(value, frozen[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_on_a_gpu_equal_a_naive_loop(family: str) -> None:
    model, parameters = build(family, "pairs-and-head")
    model.cuda()
    batch = {name: value.cuda() for name, value in ragged().items()}

    assert_same(taped(model, parameters, batch), naive(model, parameters, batch), 1e-4)
