"""AdamW against torch's, its correction for the noise against the paper's formula, and what it corrects."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.optimizers.adam import LONGEST_STEP, Adam
from fedloom.client.optimizers.adamw import AdamW
from tests.client.optimizers.stepping import RATE, Floats, drawn, ran, stepped


def torchs(start: Floats, gradients: Floats, decay: float) -> Floats:
    value = nn.Parameter(torch.from_numpy(start.copy()))
    return stepped(torch.optim.AdamW([value], lr=RATE, weight_decay=decay), value, gradients)


@pytest.mark.parametrize("correction", [False, True])
def test_without_noise_it_is_torchs_adamw_bit_for_bit(correction: bool) -> None:
    start, gradients = drawn(1, (7, 5), seed=2)[0], drawn(30, (7, 5))
    zero = np.zeros_like(start)

    free = ran(AdamW(noise_correction=correction), start, gradients)
    decayed = ran(AdamW(weight_decay=2.0, noise_correction=correction), zero, gradients)

    np.testing.assert_array_equal(free, torchs(start, gradients, 0.0))
    np.testing.assert_array_equal(decayed, torchs(zero, gradients, 2.0))


def test_decay_pulls_toward_the_rounds_start_wherever_that_is() -> None:
    """The change is torch's AdamW's from zero: its length has the bound of a round that begins at zero."""
    start, gradients = 100 * drawn(1, (7, 5), seed=2)[0], drawn(30, (7, 5))

    moved = ran(AdamW(weight_decay=20.0), start, gradients) - start

    np.testing.assert_allclose(moved, torchs(np.zeros_like(start), gradients, 20.0), atol=1e-3)
    assert np.linalg.norm(moved) < 0.9 * np.linalg.norm(ran(AdamW(), start, gradients) - start)


def test_correction_is_the_papers_formula_with_a_relative_floor() -> None:
    """DP-AdamBC, Algorithm 1 in numpy and float64: some values at the floor, others above it."""
    noise, floor = 0.5, 0.04
    gradients = drawn(12, (40,), scale=noise) + np.linspace(0, 2, 40, dtype=np.float32)
    value, mean, square = np.zeros(40), np.zeros(40), np.zeros(40)
    floored = []
    for step, gradient in enumerate(gradients.astype(np.float64), 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        first, second = mean / (1 - 0.9**step), square / (1 - 0.999**step)
        floored.append(second - noise**2 < floor * second)
        value -= RATE * first / (np.sqrt(np.maximum(second - noise**2, floor * second)) + 1e-8)

    found = ran(AdamW(noise_correction=True, floor=floor), np.zeros(40, np.float32), gradients, noise)

    assert 0.05 < np.mean(floored) < 0.95
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-6)


def test_of_pure_noise_nothing_is_left_of_the_second_moment() -> None:
    """E[v - s²] is 0, to within the standard error over 2,000 values; what Adam divides by is s."""
    noise, steps, count = 0.3, 400, 2000
    value = nn.Parameter(torch.zeros(count))
    made = AdamW(noise_correction=True).make([{"params": [value], "lr": RATE}], noise)

    stepped(made, value, drawn(steps, (count,), scale=noise))

    second = made.state[value]["square"].double().numpy() / (1 - 0.999**steps)
    standard_error = noise**2 * math.sqrt(2 / (steps * count))
    assert abs(np.mean(second - noise**2)) < 4 * standard_error
    assert standard_error < 0.01 * noise**2, "a mean that would not tell noise left in from none"


def test_values_with_signal_move_as_adam_moves_them_without_noise() -> None:
    """The paper's point: under noise Adam divides by about its standard deviation, the corrected one by the signal."""
    signal, noise, steps = 0.1, 0.3, 1500
    gradients = drawn(steps, (500,), scale=noise) + np.float32(signal)
    start = np.zeros(500, np.float32)

    moved = -np.mean(ran(AdamW(noise_correction=True), start, gradients, noise)) / (RATE * steps)
    adams = -np.mean(ran(Adam(), start, gradients)) / (RATE * steps)

    assert adams == pytest.approx(signal / math.hypot(signal, noise), rel=0.05)
    assert moved > 2.4 * adams


def test_a_step_can_be_longer_than_three_rates_and_never_than_the_bound() -> None:
    """Gradients that grow by b2/b1 after many zeros meet Cauchy and Schwarz with equality, but for the first ones."""
    growing = np.array([1e-3 * (0.999 / 0.9) ** each for each in range(80)], np.float32)
    gradients = np.concatenate([np.zeros(3000, np.float32), growing])[:, None]
    value = nn.Parameter(torch.zeros(1))
    made = Adam().make([{"params": [value], "lr": RATE}], 0.0)

    before = stepped(made, value, gradients[:-1])
    after = stepped(made, value, gradients[-1:])

    step = float(np.abs(after - before).item()) / RATE
    assert 7.0 < step < LONGEST_STEP
    assert math.isclose(LONGEST_STEP, 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999)), rel_tol=0.01)


@pytest.mark.parametrize("pull", [0.0, 3.0])
def test_a_decay_that_overshoots_has_an_infinite_bound(pull: float) -> None:
    assert AdamW(weight_decay=1e4).longest_move(1000, 1.0, 1.0, 10, pull) == math.inf
    assert AdamW(weight_decay=1.0).longest_move(10, 1.0, 1.0, 100, pull) == pytest.approx(10 * LONGEST_STEP * 10)
