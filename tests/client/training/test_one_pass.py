"""Examples of several clients in one pass: whose gradient is whose, who waits for whom, and what memory does."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedloom.client.training.one_pass.passes as module
from fedloom.client.data.tokens import Encoded, collate
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.models.load import load_model
from fedloom.client.privacy.dp_sgd.grad_sample import recording
from fedloom.client.privacy.dp_sgd.grad_sample.grouped import grouped
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.probe import made_up
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.training.gradients import batch_loss
from fedloom.client.training.microbatch import Microbatch
from fedloom.client.training.one_pass.meeting import OnePass
from fedloom.client.training.one_pass.passes import Sample, layers_of
from fedloom.core.config.run import AdapterSection, ModelSection
from fedloom.core.errors import ModelError

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "bias": {"kind": "bias"},
    "layernorm": {"kind": "layernorm"},
    "ia3": {"kind": "ia3"},
}


def twins_of(base: Path, count: int, kind: str = "lora") -> list[AdapterModel]:
    """So many, whose adapters differ."""
    spec = ModelSection(base=str(base), labels=("no", "yes"), head="train")
    model = load_model(spec, AdapterSection.model_validate(KINDS[kind]))
    generator = torch.Generator().manual_seed(3)
    made = [model.twin() for _ in range(count)]
    with torch.no_grad():
        for each in made:
            for slot in each.slots.values():
                slot.parameter.add_(0.3 * torch.randn(slot.parameter.shape, generator=generator))
    return made


def texts(model: AdapterModel, seed: int) -> Encoded:
    """Made-up examples, others for each seed."""
    known, rng = made_up(model, 16), np.random.default_rng(seed)
    return Encoded(tuple(rng.permutation(ids) for ids in known.input_ids), rng.integers(0, 2, len(known)))


@contextmanager
def clients(
    models: list[AdapterModel], chosen: list[list[int]], *, private: bool = True, size: int = 64, clip: float = 0.05
) -> Iterator[list[Sample]]:
    """A sample of each model's."""
    with ExitStack() as stack:
        made = []
        for number, (model, rows) in enumerate(zip(models, chosen, strict=True)):
            parameters = model.trainable(model.schema.roles)
            optimizer, found, microbatch = None, np.array(rows, np.int64), Microbatch(size, CPU)
            if private:
                tape = stack.enter_context(recording(model.model, parameters))
                optimizer = PrivateOptimizer(
                    torch.optim.SGD(parameters),
                    tape,
                    Seeded(number),
                    noise_multiplier=0.0,
                    clip_norm=clip,
                    expected_batch=1.0,
                )
            encoded = texts(model, number)
            made.append(
                Sample(
                    f"client-{number}",
                    model,
                    encoded,
                    found,
                    microbatch,
                    16,
                    optimizer,
                    () if private else parameters,
                    len(rows),
                )
            )
        yield made


def gradients_alone(sample: Sample) -> torch.Tensor:
    """Of each example by itself, by plain autograd, shape (examples, P)."""
    model, rows = sample.model, []
    parameters = model.trainable(model.schema.roles)
    for index in sample.indices:
        batch = collate(sample.encoded, np.array([index]), model.tokenizer.pad_token_id)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(batch_loss(model, batch), parameters)]))
    return torch.stack(rows) if rows else torch.zeros(0, sum(each.numel() for each in parameters))


def all_of(samples: list[Sample], one_pass: OnePass | None = None) -> list[BaseException | None]:
    """Each in a thread of its own; what each was told."""
    meeting, told = one_pass or OnePass(len(samples)), [None] * len(samples)
    meeting.expect(len(samples))

    def client(number: int) -> None:
        try:
            meeting.compute(samples[number])
        except BaseException as error:
            told[number] = error  # type: ignore[call-overload]
        finally:
            meeting.ended()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(samples))]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert not any(each.is_alive() for each in threads)
    return told  # type: ignore[return-value]


SAMPLES = {
    "equal": [[0, 1], [2, 3], [4, 0]],
    "unequal": [[0, 1, 2, 3, 4], [], [5, 1]],
    "one": [[0], [], []],
    "many": [[0] * 9, [0], [0, 0]],
}


@pytest.mark.parametrize("chosen", SAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_clipped_sums_are_those_of_each_clients_examples_alone(tiny_base: Path, kind: str, chosen: str) -> None:
    models, clip = twins_of(tiny_base, 3, kind), 0.05
    with clients(models, SAMPLES[chosen], clip=clip) as samples:
        assert all_of(samples) == [None] * 3
        found = [sample.optimizer.clipped_sum for sample in samples]  # type: ignore[union-attr]
    for sample, total in zip(samples, found, strict=True):
        gradients = gradients_alone(sample)
        norms = gradients.norm(dim=1)
        assert not len(norms) or (norms > clip).any()
        expected = (gradients * (clip / norms).clamp(max=1)[:, None]).sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("chosen", SAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_privacy_each_gets_the_gradient_of_its_own_mean(tiny_base: Path, kind: str, chosen: str) -> None:
    models = twins_of(tiny_base, 3, kind)
    with clients(models, SAMPLES[chosen], private=False) as samples:
        assert all_of([each for each in samples if len(each.indices)]) == [None] * sum(map(bool, SAMPLES[chosen]))
    for sample in samples:
        grads = [slot.parameter.grad for slot in sample.model.slots.values()]
        if not len(sample.indices):
            assert grads == [None] * len(grads)
            continue
        found = torch.cat([each.flatten() for each in grads])  # type: ignore[union-attr]
        torch.testing.assert_close(found, gradients_alone(sample).mean(0), rtol=1e-4, atol=2e-6)


def test_one_clients_clipped_sum_knows_nothing_of_the_others(tiny_base: Path) -> None:
    models, sums = twins_of(tiny_base, 3), []
    for other in (1.0, 50.0, float("nan")):
        with torch.no_grad():
            for slot in models[1].slots.values():
                slot.parameter.mul_(other)
        with clients(models, [[0, 1], [2, 3], [4, 0]]) as samples:
            assert all_of(samples) == [None] * 3
            sums.append(samples[0].optimizer.clipped_sum)  # type: ignore[union-attr]
    assert sums[0].norm() > 0
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("private", [True, False])
def test_a_pass_that_memory_has_no_room_for_is_done_again_in_parts(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    original, rows = module._pass, list[int]()

    def short(shares: Any) -> None:
        count = sum(len(part.rows) for _, part in shares)
        rows.append(count)
        original(shares)
        if count > 8:  # after the gradients have been added, so that they must be forgotten
            raise MemoryError

    monkeypatch.setattr(module, "_pass", short)
    models = twins_of(tiny_base, 3)
    with clients(models, [[0, 1, 2, 3], [1, 2, 4], [5, 0, 1]], private=private) as samples:
        assert all_of(samples) == [None] * 3
        found = [
            sample.optimizer.clipped_sum  # type: ignore[union-attr]
            if private
            else torch.cat([slot.parameter.grad.flatten() for slot in sample.model.slots.values()])  # type: ignore[union-attr]
            for sample in samples
        ]
    assert max(rows) > 8
    for sample, total in zip(samples, found, strict=True):
        gradients = gradients_alone(sample)
        scales = (
            (0.05 / gradients.norm(dim=1)).clamp(max=1)
            if private
            else torch.full((len(gradients),), 1 / len(gradients))
        )
        torch.testing.assert_close(total, (gradients * scales[:, None]).sum(0), rtol=1e-4, atol=2e-6)


def test_an_error_in_a_pass_reaches_everybody_in_it(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_shares: Any) -> None:
        raise ModelError("no")

    monkeypatch.setattr(module, "_pass", failing)
    with clients(twins_of(tiny_base, 2), [[0], [1]]) as samples:
        assert [str(each) for each in all_of(samples)] == ["no", "no"]


@pytest.mark.parametrize("way", ["ended", "close"])
def test_nobody_waits_for_a_turn_that_is_over(tiny_base: Path, way: str) -> None:
    with clients(twins_of(tiny_base, 1), [[0, 1]]) as (sample,):
        meeting = OnePass(2)
        meeting.expect(2)
        waiting = threading.Thread(target=meeting.compute, args=(sample,))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()  # the other may still come
        getattr(meeting, way)()
        waiting.join(60)
        assert not waiting.is_alive()
        assert sample.optimizer.clipped_sum.norm() > 0  # type: ignore[union-attr]


def test_a_layer_that_mixes_rows_is_refused_and_forwards_are_put_back(tiny_base: Path) -> None:
    models = twins_of(tiny_base, 2)
    layers = [layers_of(each) for each in models]
    before = [vars(each).get("forward") for each in layers[0]]
    x = torch.zeros(5, 2, 8)
    with (
        pytest.raises(ModelError, match=r"saw 5 rows for 4 examples.*set engine.one_pass = false"),
        grouped(layers, [2, 2], None),
    ):
        layers[0][0](x)
    assert [vars(each).get("forward") for each in layers[0]] == before
