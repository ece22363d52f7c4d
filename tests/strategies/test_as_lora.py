"""AS-LoRA against its formulas in numpy: scores, chances, choices that all clients share, and exact averages."""

import math

import numpy as np
import pytest

from fedloom.core.errors import ConfigError
from fedloom.core.schema import Array, Role
from fedloom.strategies.alternating.as_lora import ASLoRA
from fedloom.strategies.api import State, Update
from fedloom.strategies.conformance import StrategyConformance, run_round
from fedloom.strategies.state import state_from_bytes, state_to_bytes

SCORES = "as_lora/scores"


class TestShortWarmup(StrategyConformance):
    """The battery's three rounds reach rounds whose factors are drawn."""

    def strategy(self) -> ASLoRA:
        return ASLoRA(warmup=2)


def begun(warmup: int = 2, seed: int = 5) -> tuple[ASLoRA, State]:
    strategy = ASLoRA(warmup=warmup)
    _, state = TestShortWarmup().begin()
    return strategy, strategy.init(state.schema, state.adapter, seed)


def moving(strategy: ASLoRA, state: State) -> list[str]:
    """The factor of each pair that a round trains."""
    names = state.schema.select(strategy.plan(state, state.round, "ada").train).names()
    found = [[role for role in (pair.b, pair.a) if role in names] for pair in state.schema.pairs]
    assert all(len(each) == 1 for each in found), "one factor of every pair"
    return [each[0] for each in found]


def noisy(update: Update, noise_std: float) -> Update:
    return Update(update.client, update.weight, update.start, update.delta, noise_std=noise_std)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_scores_choices_and_averages_are_those_of_the_formulas(noise: float) -> None:
    strategy, state = begun()
    battery = TestShortWarmup()
    scores: dict[str, float] = {}
    seen = set()
    for round in range(12):
        now = moving(strategy, state)
        seen |= {(round > 1, name) for name in now}
        draw = np.random.Generator(np.random.Philox(key=[5, round])).random(2)
        for index, pair in enumerate(state.schema.pairs):
            if round < 2:
                assert now[index] == (pair.b, pair.a)[round % 2]
            else:
                a, b = scores[pair.a], scores[pair.b]
                heat = max(0.1, 0.95 ** (round - 2))
                chance = 1 / (1 + math.exp(-((a - b) / (a + b) if a + b else 0.0) / heat))
                assert now[index] == (pair.a if draw[index] < chance else pair.b)
        updates = [noisy(each, noise * (1 + k)) for k, each in enumerate(battery.updates(strategy, state))]
        shares = np.array([each.weight for each in updates]) / sum(each.weight for each in updates)

        after = run_round(strategy, state, updates)

        for row, (pair, name) in enumerate(zip(state.schema.pairs, now, strict=True)):
            mean = sum(share * each.delta[name].astype(np.float64) for share, each in zip(shares, updates, strict=True))
            variance = sum((share * each.noise_std) ** 2 for share, each in zip(shares, updates, strict=True))
            energy = max(float(np.sum(np.square(mean))) - np.size(mean) * variance, 0.0)
            scores[name] = energy if name not in scores else 0.9 * scores[name] + 0.1 * energy
            assert after.memory[SCORES][row, int(name == pair.a)] == pytest.approx(scores[name], rel=1e-9)
            exact = np.zeros((after.adapter[pair.b].shape[0], after.adapter[pair.a].shape[1]))
            for share, each in zip(shares, updates, strict=True):
                left, right = (each.value(n) if n in each.delta else state.adapter[n] for n in (pair.b, pair.a))
                exact += share * left @ right
            np.testing.assert_allclose(
                after.adapter[pair.b].astype(np.float64) @ after.adapter[pair.a], exact, atol=2e-6
            )
        state = after
    assert {name for drawn, name in seen if drawn} == state.schema.names(Role.LORA_A, Role.LORA_B)


def test_pure_noise_scores_nothing_and_a_signal_scores_its_energy() -> None:
    """Over 400 rounds the mean score is the energy of the signal, to four standard errors, whatever the noise adds."""
    strategy, state = begun(warmup=400)
    drawn = np.random.default_rng(3)
    pair = state.schema.pairs[0]
    shape = state.adapter[pair.b].shape
    signal, noise = np.full(shape, 0.5), 0.4
    found = {0.0: [], 1.0: []}  # type: dict[float, list[float]]
    for strength, energies in found.items():
        for _ in range(400):
            updates = []
            for client, weight, std in (("ada", 1.0, noise), ("bo", 3.0, 2 * noise)):
                plan = strategy.plan(state, 0, client)
                delta: dict[str, Array] = {}
                for spec in state.schema.select(plan.train).tensors:
                    moved = drawn.normal(0, std, spec.shape) + (strength * signal if spec.name == pair.b else 0)
                    delta[spec.name] = moved.astype(np.float32)
                updates.append(Update(client, weight, plan.broadcast, delta, noise_std=std))
            energies.append(float(run_round(strategy, state, updates).memory[SCORES][0, 0]))
    variance = (0.25 * noise) ** 2 + (0.75 * 2 * noise) ** 2
    alone = signal.size * variance
    # Of noise alone half the rounds come out below zero and count as zero: what is left is half its deviation.
    assert np.mean(np.array(found[0.0]) == 0) == pytest.approx(0.55, abs=0.1)
    assert np.mean(found[0.0]) < 0.15 * alone
    error = float(np.std(found[1.0])) / 20
    assert np.mean(found[1.0]) == pytest.approx(np.sum(signal**2), abs=4 * error)
    assert 4 * error < 0.3 * alone, "a mean that would not tell noise left in from none"


def test_the_factor_with_more_energy_beyond_its_noise_is_trained_in_the_end() -> None:
    strategy, state = begun()
    battery = TestShortWarmup()
    chosen = []
    for _ in range(70):
        names = moving(strategy, state)
        chosen.append(names)
        updates = battery.updates(strategy, state)
        for update in updates:
            for name, delta in update.delta.items():
                delta *= 1.0 if name.endswith("lora_A") else 0.05
        state = run_round(strategy, state, updates)

    assert all(name.endswith("lora_A") for names in chosen[-15:] for name in names)


def test_a_resumed_run_draws_the_same_and_another_seed_does_not() -> None:
    ends = []
    for seed in (5, 5, 6):
        strategy, state = begun(seed=seed)
        for _ in range(8):
            updates = TestShortWarmup().updates(strategy, state)
            state = run_round(strategy, state_from_bytes(state_to_bytes(state), state.schema), updates)
            strategy = ASLoRA(warmup=2)
        ends.append((state_to_bytes(state), state.memory[SCORES]))

    assert ends[0][0] == ends[1][0]
    assert not np.array_equal(ends[0][1], ends[2][1], equal_nan=True)


@pytest.mark.parametrize("warmup", [1, 0, -3])
def test_a_warm_up_that_leaves_a_factor_without_a_score_is_refused(warmup: int) -> None:
    with pytest.raises(ConfigError, match="set 2 rounds or more"):
        ASLoRA(warmup=warmup)
