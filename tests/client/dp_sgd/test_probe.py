"""The sensitivity probe passes on models that keep examples apart and names what does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedloom.client.data.rows import IGNORED, Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd import probe as module
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.probe import BatchLoss, made_up, probe
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.losses import per_example
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import UNITS

Build = Callable[..., AdapterModel]
Batch = dict[str, torch.Tensor]

CASES: list[tuple[str, str]] = [
    ("bert", "text-classification"),
    ("bert", "token-classification"),
    ("gpt2", "text-classification"),
    ("gpt2", "token-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "text-classification"),
    ("llama", "token-classification"),
    ("llama", "causal-lm"),
]


def right(model: AdapterModel) -> BatchLoss:
    return lambda batch: per_example(model.logits(batch), batch["labels"]).sum()


@pytest.mark.parametrize(("architecture", "task"), CASES)
def test_it_passes_and_leaves_the_model_as_it_was(architecture: str, task: str, build_task: Build) -> None:
    model = build_task(architecture, task)
    state = [*model.model.named_parameters(), *model.model.named_buffers()]
    before = {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in state}
    random = torch.random.get_rng_state()

    probe(model, right(model), 24)

    assert model.probed
    for name, tensor in state:
        assert torch.equal(tensor, before[name][0]), name
        assert tensor.requires_grad == before[name][1], name
        assert tensor.grad is None
    assert torch.equal(torch.random.get_rng_state(), random)


def token_mean(model: AdapterModel) -> BatchLoss:
    """What `model(labels=...)` gives: the mean over all labelled tokens of the batch, times the batch."""

    def loss(batch: Batch) -> torch.Tensor:
        scores = model.logits(batch)
        mean = F.cross_entropy(scores.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED)
        return mean * len(scores)

    return loss


@pytest.mark.parametrize(("architecture", "task"), [case for case in CASES if case[1] != "text-classification"])
def test_a_mean_over_the_batchs_tokens_is_refused(architecture: str, task: str, build_task: Build) -> None:
    model = build_task(architecture, task)

    with pytest.raises(ModelError, match=r"gradient is not the one it has alone.*sum of per-example losses"):
        probe(model, token_mean(model), 24)

    assert not model.probed


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_hugging_faces_own_loss_is_refused(architecture: str, build_task: Build) -> None:
    model = build_task(architecture, "causal-lm")

    def loss(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = model.model(**batch).loss
        return found

    with pytest.raises(ModelError, match="not the one it has alone"):
        probe(model, loss, 24)


@pytest.mark.parametrize("share", [1.0, 1e-3])
def test_scores_centred_over_the_batch_are_refused(share: float, build_task: Build) -> None:
    model = build_task("bert", "text-classification")

    def loss(batch: Batch) -> torch.Tensor:
        scores = model.logits(batch)
        return per_example(scores - share * scores.mean(0), batch["labels"]).sum()

    with pytest.raises(
        ModelError, match=r"not the one it has alone|the gradient of another one changes|a gradient of norm 0"
    ):
        probe(model, loss, 24)


def test_a_faint_influence_shows_between_batches_of_one_shape(build_task: Build) -> None:
    """Less than what padding may change, and so only seen where nothing may."""
    model = build_task("bert", "text-classification")

    def loss(batch: Batch) -> torch.Tensor:
        scores = model.logits(batch)
        return per_example(scores - 3e-4 * (scores.mean(0) - scores), batch["labels"]).sum()

    with pytest.raises(ModelError, match="replaced by one of the same length, the gradient of another one changes"):
        probe(model, loss, 24)


def test_negatives_from_the_batch_are_refused(build_task: Build) -> None:
    model = build_task("bert", "text-classification")

    def loss(batch: Batch) -> torch.Tensor:
        scores = F.normalize(model.logits(batch), dim=1)
        return F.cross_entropy(scores @ scores.T, torch.arange(len(scores)), reduction="sum")

    with pytest.raises(ModelError, match="sensitivity probe"):
        probe(model, loss, 24)


class Centred(nn.Module):
    """Batch normalisation of one's own making, which no list of layers knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean((0, 2), keepdim=True)) / (x.std((0, 2), keepdim=True) + 1e-3)


class Normed(nn.Module):
    """A layer followed by a normalisation over examples and tokens."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.layer(x).transpose(1, 2)).transpose(1, 2)
        return out


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(48), nn.BatchNorm1d(48, track_running_stats=False), Centred()])
def test_batch_normalisation_is_refused(norm: nn.Module, build_task: Build) -> None:
    model = build_task("bert", "token-classification")
    encoder = model.model.get_submodule("base_model.model.bert.encoder.layer.0.intermediate")
    encoder.dense = Normed(encoder.dense, norm.train()).requires_grad_(False)

    # torch's own are refused by name before anything is compared.
    with pytest.raises(ModelError, match=r"normalises over the batch|not the one it has alone"):
        probe(model, right(model), 24)


def test_a_buffer_that_remembers_the_data_is_refused(build_task: Build) -> None:
    """Batch normalisation that has a momentum so small that the gradients of this very batch show nothing."""
    model = build_task("bert", "token-classification")
    head = model.model.get_submodule("base_model.model.bert.encoder.layer.0.intermediate")
    head.register_buffer("seen", torch.zeros(()))
    head.register_forward_pre_hook(lambda module, inputs: module.seen.add_(inputs[0].detach().sum()) and None)

    with pytest.raises(ModelError, match=r"changes base_model\.model.*seen, which carries what it saw"):
        probe(model, right(model), 24)


def test_a_trained_parameter_that_is_not_recorded_is_refused(build_task: Build) -> None:
    model = build_task("bert", "text-classification")
    head = next(slot for slot in model.slots.values() if slot.spec.name.endswith("classifier.weight"))
    del model.slots[head.spec.name]
    model.schema = type(model.schema)(tuple(slot.spec for slot in model.slots.values()), model.schema.scale)
    head.parameter.requires_grad_(True)

    with pytest.raises(
        ModelError, match=r"1 trained parameters such as \S+classifier\S+ are not part of the adapter, so nobody"
    ):
        probe(model, right(model), 24)


def test_a_clip_that_does_nothing_is_refused(build_task: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_task("bert", "text-classification")

    def unclipped(self: PrivateOptimizer, real: int | None = None) -> None:
        self._total += (self.tape.flat.sum(0) * UNITS / self.max_grad_norm).long()

    monkeypatch.setattr(PrivateOptimizer, "clip_and_accumulate", unclipped)

    with pytest.raises(ModelError, match="the clipped sum moves too far, in units of C"):
        probe(model, right(model), 24)


def test_a_clip_of_each_tensor_by_itself_is_refused(build_task: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tensors with a bound of C each are together longer than C."""
    model = build_task("bert", "text-classification")

    def separately(self: PrivateOptimizer, real: int | None = None) -> None:
        for parameter in self.tape.parameters:
            part = self.tape.flat[:, self.tape.columns[parameter]]
            norms = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            total = (part * (self.max_grad_norm / norms).clamp(max=1.0)).sum(0)
            self._total[self.tape.columns[parameter]] = (total * UNITS / self.max_grad_norm).long()

    monkeypatch.setattr(PrivateOptimizer, "clip_and_accumulate", separately)

    with pytest.raises(ModelError, match="the clipped sum moves too far, in units of C"):
        probe(model, right(model), 24)


def test_a_recording_that_is_not_the_gradient_is_refused(build_task: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_task("bert", "text-classification")
    add = Tape.add

    def halved(self: Tape, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        add(self, parameter, 0.5 * gradient)

    monkeypatch.setattr(Tape, "add", halved)

    with pytest.raises(ModelError, match="not the one it has alone"):
        probe(model, right(model), 24)


def test_a_norm_that_comes_out_too_small_is_refused(build_task: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_task("bert", "text-classification")
    norms = Tape.norms
    monkeypatch.setattr(Tape, "norms", lambda self: 0.99 * norms(self))

    with pytest.raises(ModelError, match="the clipped sum moves too far, in units of C"):
        probe(model, right(model), 24)


def test_dropout_is_refused(build_task: Build) -> None:
    model = build_task("bert", "text-classification")
    model.model.train()

    with pytest.raises(ModelError, match="sensitivity probe"):
        probe(model, right(model), 24)


def test_weights_that_give_no_number_are_refused(build_task: Build) -> None:
    model = build_task("bert", "text-classification")
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(float("nan"))

    with pytest.raises(ModelError, match="check the base model's weights"):
        probe(model, right(model), 24)


def test_a_gradient_that_is_no_number_in_a_batch_is_refused(build_task: Build) -> None:
    model = build_task("bert", "text-classification")

    def loss(batch: Batch) -> torch.Tensor:
        return right(model)(batch) * (1.0 if len(batch["labels"]) == 1 else float("nan"))

    with pytest.raises(ModelError, match=r"not the one it has alone \(nan; at most"):
        probe(model, loss, 24)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_length_the_model_cannot_read_is_refused(architecture: str, build_task: Build) -> None:
    """A text that long would end the run when it is sampled, which tells that it is there."""
    model = build_task(architecture, "text-classification")

    with pytest.raises(ModelError, match=r"cannot read model\.max_length = 65 tokens; lower it"):
        probe(model, right(model), 65)


def test_a_model_that_has_passed_is_not_probed_again(build_task: Build) -> None:
    model = build_task("llama", "causal-lm")
    probe(model, right(model), 24)

    probe(model, lambda _: pytest.fail("the model was probed again"), 24)


@pytest.mark.parametrize("task", ["text-classification", "token-classification", "causal-lm"])
def test_the_examples_are_made_up_and_of_unequal_length(task: str, build_task: Build) -> None:
    model = build_task("llama", task)

    examples, again = made_up(model, 24), made_up(model, 24)

    assert [len(ids) for ids in examples.input_ids] == [3, 7, 17, 20, 20, 24, 2]
    assert all(np.array_equal(one, two) for one, two in zip(examples.input_ids, again.input_ids, strict=True))
    assert not any(np.isin(ids, model.tokenizer.all_special_ids).any() for ids in examples.input_ids)
    assert all((row != IGNORED).any() and (row == IGNORED).any() for row in examples.targets)


def trainer(model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger | None) -> Trainer:
    return Trainer(model, rows, spec, policy, ledger)


@pytest.mark.parametrize("private", [True, False])
def test_every_private_trainer_probes_its_own_loss_on_no_private_row(
    private: bool,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = spec.model_dump()
    chosen = Spec.model_validate({**tables, "privacy": tables["privacy"] | {"enabled": private}})
    seen: list[Batch] = []

    def mixing(self: Trainer, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        scores = self.model.logits(batch)
        return per_example(scores - scores.mean(0), batch["labels"]).sum()

    monkeypatch.setattr(Trainer, "_batch_loss", mixing)
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as ledger:
        if private:
            with pytest.raises(ModelError, match="sensitivity probe"):
                Trainer(tiny_model, rows, chosen, policy, ledger)
        else:
            Trainer(tiny_model, rows, chosen, policy, None)
            assert len(seen) == 1, "only what an example takes is measured"
        assert ledger.charges() == []
    words = {int(token) for ids in tiny_model.tokenizer(list(rows.texts))["input_ids"] for token in ids}
    probed = {int(token) for batch in seen for token in batch["input_ids"][batch["attention_mask"] == 1]}
    assert not words & probed


def halved(model: AdapterModel) -> AdapterModel:
    """The base model in bfloat16, the adapter in float32."""
    trained = {id(slot.parameter) for slot in model.slots.values()}
    for parameter in model.model.parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.bfloat16()
    return model


def test_half_precision_passes_within_its_own_tolerance(build_task: Build) -> None:
    model = halved(build_task("llama", "causal-lm"))

    probe(model, right(model), 24)

    assert model.probed


def test_half_precision_that_rounds_away_a_padding_passes_by_its_own_values(
    build_task: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a deep model of bfloat16 an example's gradients in two paddings have nothing in common; in float32 they do."""
    monkeypatch.setattr(module, "_HALF", replace(module._HALF, padding=1e-4))
    model = halved(build_task("llama", "causal-lm"))
    before = {name: each.detach().clone() for name, each in model.model.named_parameters()}

    probe(model, right(model), 24)

    for name, each in model.model.named_parameters():
        assert each.dtype == before[name].dtype
        assert torch.equal(each, before[name])

    # Without room for float32 there is but the comparison in half precision, and its refusal says what would tell.
    model.probed = False
    monkeypatch.setattr(module, "free_bytes", lambda *_: 1)
    with pytest.raises(ModelError, match=r'compute\.dtype = "float32" would tell'):
        probe(model, right(model), 24)


def test_half_precision_does_not_hide_a_mean_over_the_batch(build_task: Build) -> None:
    model = halved(build_task("llama", "causal-lm"))

    with pytest.raises(ModelError, match="not the one it has alone"):
        probe(model, token_mean(model), 24)
