"""What one private step promises: bounded sensitivity, exact noise, no failure on odd batches."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.client.privacy.dp_sgd.grad_sample import hooked, recording
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded, System
from fedloom.core.errors import ModelError
from fedloom.core.privacy.gaussian import UNITS, Integers, longest


class Silence:
    """No noise, to look at the sum alone."""

    def uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.zeros(count)

    def normal(self, deviation: int, count: int) -> Integers:
        return np.zeros(count, np.int64)


def step(
    x: torch.Tensor,
    entropy: Entropy,
    *,
    sigma: float = 1.0,
    clip: float = 0.5,
    width: int = 4,
    automatic: bool = False,
) -> torch.Tensor:
    """The gradient one private step hands to SGD for a linear layer under a quadratic loss, times the divisor."""
    layer = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, width))
    parameters = list(layer.parameters())
    with recording(layer, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.0),
            tape,
            entropy,
            noise_multiplier=sigma,
            clip_norm=clip,
            expected_batch=10,
            automatic=automatic,
        )
        if len(x):
            tape.begin(len(x))
            torch.autograd.backward(layer(x).square().sum())
            optimizer.accumulate()
        optimizer.release()
        assert layer.weight.grad is not None
        return layer.weight.grad.reshape(-1) * 10


@pytest.mark.parametrize("automatic", [False, True], ids=["threshold", "automatic"])
@pytest.mark.parametrize("extra", [1e-30, 1e-3, 1.0, 1e6, float("inf"), float("nan")])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(extra: float, automatic: bool) -> None:
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    added = torch.cat([data, torch.full((1, 4), extra)])

    distance = (step(added, Silence(), automatic=automatic) - step(data, Silence(), automatic=automatic)).norm()

    assert torch.isfinite(distance)
    assert distance <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_automatic_clipping_is_the_papers(clip: float) -> None:
    x = np.random.default_rng(3).standard_normal((6, 4)) * np.array([[1e-4], [1e-2], [0.1], [1], [10], [1e3]])
    weight = np.linspace(-1, 1, 4)
    each = 2 * (x @ weight)[:, None] * x
    expected = clip * (each / (np.linalg.norm(each, axis=1, keepdims=True) + 0.01)).sum(0)

    found = step(torch.from_numpy(x.astype(np.float32)), Silence(), clip=clip, automatic=True)

    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=clip * 1e-4)


def test_the_clip_norm_of_automatic_clipping_scales_signal_and_noise_alike() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    small, large = (step(x, Seeded(2), clip=clip, automatic=True) for clip in (0.5, 4.0))

    np.testing.assert_allclose(large.numpy(), 8 * small.numpy(), rtol=1e-6)


def test_a_non_finite_example_counts_as_zero() -> None:
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    assert torch.equal(step(torch.cat([data, torch.full((1, 4), float("nan"))]), Silence()), step(data, Silence()))


def test_empty_batch_is_a_step_of_pure_noise() -> None:
    noisy = step(torch.zeros(0, 4), Seeded(5), sigma=2.0, clip=0.5)

    np.testing.assert_allclose(noisy.numpy(), Seeded(5).normal(2 * UNITS, 4) * 0.5 / longest(4), rtol=1e-6)


def test_noise_has_the_promised_spread() -> None:
    drawn = step(torch.zeros(0, 40_000), System(), sigma=1.5, clip=2.0, width=40_000).numpy()

    # Standard error of a standard deviation is sd / sqrt(2n) = 0.0106; five of them.
    assert abs(drawn.std() - 3.0) < 0.053
    assert abs(drawn.mean()) < 5 * 3.0 / np.sqrt(40_000)


def test_system_noise_is_normal_and_not_repeated() -> None:
    draws = System().normal(UNITS, 50_000)
    from scipy.stats import kstest

    assert kstest(draws / UNITS, "norm").pvalue > 1e-6
    assert len(np.unique(draws)) > 48_500  # of about 4.1 million likely steps, some 420 pairs meet


def test_system_entropy_ignores_every_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = System().normal(UNITS, 8)
    torch.manual_seed(0)
    np.random.seed(0)

    assert not np.array_equal(first, System().normal(UNITS, 8))


def test_system_uniform_lies_in_the_half_open_interval() -> None:
    values = System().uniform(100_001)

    assert values.shape == (100_001,)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * 100_001)


def test_opacus_step_is_refused() -> None:
    layer = nn.Linear(2, 1)
    parameters = list(layer.parameters())
    with recording(layer, parameters) as tape:
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, lr=0.1), tape, Seeded(1), noise_multiplier=1, clip_norm=1, expected_batch=4
        )
        with pytest.raises(NotImplementedError, match="release"):
            optimizer.step()


class Counting(Silence):
    """Notes the size of every draw."""

    def __init__(self) -> None:
        self.draws: list[int] = []

    def normal(self, deviation: int, count: int) -> Integers:
        self.draws.append(count)
        return np.full(count, deviation)


def network() -> nn.Sequential:
    """A layer whose gradients the tape forms (six tokens) between two that it keeps as factors (one token)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 3))


def summed(
    parts: list[torch.Tensor], *, clip: float = 0.5, entropy: Entropy | None = None, by: Callable[..., Any] = recording
) -> torch.Tensor:
    """The gradient of one private step over microbatches, times the divisor; shape (P,)."""
    model = network()
    parameters = list(model.parameters())
    with by(model, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.0)
        drawn = entropy or Silence()
        optimizer = PrivateOptimizer(base, tape, drawn, noise_multiplier=1.0, clip_norm=clip, expected_batch=10)
        for part in parts:
            tape.begin(len(part))
            if len(part):
                torch.autograd.backward(model(part).square().sum())
            optimizer.accumulate()
        optimizer.release()
        return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]) * 10


def examples(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 3, 7, 12])
@pytest.mark.parametrize("by", [recording, hooked])
def test_the_sum_does_not_depend_on_the_microbatch_size(size: int, by: Callable[..., Any]) -> None:
    data = examples(12)

    torch.testing.assert_close(summed(list(torch.split(data, size)), by=by), summed([data]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_a_step_draws_noise_once_however_many_microbatches_it_has(parts: int) -> None:
    entropy = Counting()

    noisy = summed(list(examples(8).chunk(parts)) if parts else [], entropy=entropy)

    silent = summed([examples(8)] if parts else [])
    assert entropy.draws == [len(noisy)]
    torch.testing.assert_close(
        noisy - silent, torch.full_like(noisy, 0.5 * UNITS / longest(len(noisy))), rtol=0, atol=1e-5
    )


def test_a_second_step_starts_from_zero_and_no_example_counts_twice() -> None:
    layer = nn.Linear(4, 2)
    parameters = list(layer.parameters())
    with recording(layer, parameters) as tape:
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = PrivateOptimizer(base, tape, Silence(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=1)
        tape.begin(3)
        torch.autograd.backward(layer(torch.ones(3, 4)).square().sum())
        optimizer.accumulate()
        with pytest.raises(ModelError, match="got no gradient"):
            optimizer.accumulate()
        optimizer.release()
        assert layer.weight.grad is not None
        assert layer.weight.grad.any()

        optimizer.release()

        assert not layer.weight.grad.any()


@pytest.mark.parametrize("by", [recording, hooked])
def test_empty_microbatches_add_nothing(by: Callable[..., Any]) -> None:
    data = examples(3)

    assert not summed([data[:0]], by=by).any()
    assert torch.equal(summed([data[:0], data, data[:0]], by=by), summed([data], by=by))


@pytest.mark.parametrize("by", [recording, hooked])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_non_finite_examples_add_nothing_to_any_layer(value: float, by: Callable[..., Any]) -> None:
    data = examples(5)
    poisoned = data.clone()
    poisoned[[1, 3], 2] = value
    if value == 1e30:  # finite, with a gradient that is not
        poisoned[[1, 3]] *= 1e8

    torch.testing.assert_close(summed([poisoned], by=by), summed([data[[0, 2, 4]]], by=by), rtol=1e-5, atol=1e-6)
    assert not summed([poisoned[[1, 3]]], by=by).any()


@pytest.mark.parametrize("clip", [1e-6, 1e-3, 1.0])
def test_a_single_example_contributes_at_most_the_clip_norm(clip: float) -> None:
    for seed in range(20):
        assert summed([examples(1, seed) * 100], clip=clip).norm() <= clip * (1 + 1e-6)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 4),
    st.integers(0, 10_000),
    st.sampled_from(["copy", "zero", "huge", "tiny", "nan", "inf", "one row"]),
    st.sampled_from([1e-3, 0.5, 50.0]),
)
def test_adding_any_example_moves_the_sum_by_at_most_the_clip_norm(
    count: int, seed: int, kind: str, clip: float
) -> None:
    data, added = examples(count, seed), examples(1, seed + 1)
    if kind == "copy" and count:
        added = data[:1].clone()
    added *= {"zero": 0.0, "huge": 1e15, "tiny": 1e-15, "nan": float("nan"), "inf": float("inf")}.get(kind, 1.0)
    if kind == "one row":
        added[0, 1:] = 0.0

    distance = (summed([torch.cat([data, added])], clip=clip) - summed([data], clip=clip)).norm()

    # float32 sums: 1e-6 of the whole sum's bound, (count + 1)·C.
    assert distance <= clip * (1 + 1e-6 * (count + 1))


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Most bytes of tensor storage that were alive at once among those made while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now, self.most = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_of(examples_in_all: int, *, vocabulary: int) -> int:
    """Peak bytes of one step over microbatches of 4 on a head over a vocabulary."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, vocabulary))
    parameters = list(model.parameters())
    parts = torch.split(torch.randn(examples_in_all, 3, 8), 4)
    with recording(model, parameters) as tape, Peak() as peak:
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = PrivateOptimizer(base, tape, Silence(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=10)
        for part in parts:
            tape.begin(len(part))
            torch.autograd.backward(model(part.clone()).square().sum())
            optimizer.accumulate()
        optimizer.release()
    return int(peak.most)


def test_peak_memory_does_not_grow_with_the_logical_batch() -> None:
    few, many = peak_of(8, vocabulary=100), peak_of(80, vocabulary=100)

    assert many <= few * 1.01


def test_a_large_matrix_needs_no_gradient_of_its_own_size_for_each_example() -> None:
    weight_bytes = 64 * 2000 * 4

    # The sum in 64 bits, one example's product, that in 32 bits before and after it is summed, and 1.3 of activations;
    # not four examples' products in place of one.
    assert peak_of(4, vocabulary=2000) < 7 * weight_bytes
