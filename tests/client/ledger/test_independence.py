"""Randomness that nobody can subtract or foresee: noise and samples are independent and of the system's own making."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.attacks import LIMIT, dependence
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import System, poisson
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training import trainer as trainer_module
from fedloom.client.training.local_eval import released
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.gaussian import LARGEST_DEVIATION, UNITS
from tests.client.rounds import Everyone, Floats, assignment, changed, start


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", "sha256:" + "0" * 64) as opened:
        yield opened


def test_noise_is_independent_in_pairs_in_blocks_and_between_calls() -> None:
    calls = [System().normal(LARGEST_DEVIATION, 1 << 15) for _ in range(4)]
    draws = np.concatenate(calls)

    assert dependence(draws / LARGEST_DEVIATION) < LIMIT
    # 131,072 values of 2^31 times a few: two meet in value or size 2.3 times on average.
    assert len(np.unique(np.abs(draws))) > len(draws) - 20


def test_keys_do_not_come_again() -> None:
    """By the birthday of keys: of 2,000 with sixteen bits thirty would meet."""
    assert len({System().normal(LARGEST_DEVIATION, 4).tobytes() for _ in range(2000)}) == 2000


def test_steps_of_a_round_draw_noise_of_their_own() -> None:
    parameter = nn.Parameter(torch.zeros(20_000))
    base, tape = torch.optim.SGD([parameter], lr=0.0), Tape([parameter])
    optimizer = PrivateOptimizer(base, tape, System(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=1.0)
    steps = []
    for _ in range(4):
        optimizer.release()
        assert parameter.grad is not None
        steps.append(parameter.grad.numpy().astype(np.float64))

    assert dependence(np.concatenate(steps)) < LIMIT
    # Nor does a step carry noise of the one before.
    assert np.allclose([step.std() for step in steps], 1.0, rtol=0.03)


def test_rounds_draw_noise_of_their_own(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    rare = changed(spec, run={"rounds": 8}, train={"sampling_rate": 1e-9, "learning_rate": 1e-6, "steps": 4})
    trainer = Trainer(tiny_model, rows, rare, policy, ledger)
    still = {name: np.zeros_like(value) for name, value in start(tiny_model).items()}
    scale = 1e-6 * 0.7 / (1e-9 * 40)

    deltas = []
    for each in range(8):
        trained = trainer.train("run", assignment(round=each), still)
        trainer.release(trained.charge, "0" * 64)
        deltas.append(trained.delta)

    noise = np.concatenate([delta[each.name].ravel() for delta in deltas for each in tiny_model.schema.tensors]) / scale
    assert dependence(noise) < LIMIT
    assert noise.std() == pytest.approx(2.0, rel=5 / np.sqrt(2 * len(noise))), "four steps of deviation 1"


def test_samples_of_a_private_run_follow_no_seed(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings of one round of one run, on real entropy; and a step's sample says nothing about the next."""
    found: list[tuple[int, ...]] = []

    def noting(*arguments: Any) -> Any:
        sample = poisson(*arguments)
        found.append(tuple(sample.tolist()))
        return sample

    monkeypatch.setattr(trainer_module, "poisson", noting)
    for again in (False, True):
        for number in range(2):
            torch.manual_seed(0)
            np.random.seed(0)
            trainer = Trainer(tiny_model, rows, spec, policy, ledger)
            trained = trainer.train("run", assignment(round=number), start(tiny_model))
            if again:
                trainer.release(trained.charge, "0" * 64)

    assert len(found) == 2 * 2 * spec.train.steps
    assert len(set(found)) == len(found)


class Ruler(Everyone):
    """Puts row i of n at i / n, so that a rate q takes the first q n rows."""

    def uniform(self, count: int) -> Floats:
        return np.arange(count) / count


@pytest.mark.parametrize("declared", [20, 40, 80])
def test_the_rate_is_the_runs_whatever_the_size_that_is_declared(
    declared: int,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = policy.model_copy(update={"data": policy.data.model_copy(update={"declared_examples": declared})})
    found: list[int] = []

    def noting(*arguments: Any) -> Any:
        sample = poisson(*arguments)
        found.append(len(sample))
        return sample

    monkeypatch.setattr(trainer_module, "poisson", noting)
    trainer = Trainer(tiny_model, rows, spec, site, ledger, entropy_for=lambda _: Ruler())
    trainer.train("run", assignment(), start(tiny_model))

    assert found == [12] * spec.train.steps, "0.3 of the 40 rows that are there"


def test_the_rate_is_rounded_down() -> None:
    """To a multiple of 2^-53, the step of the uniform draws: at zero itself nobody is in the sample of a lower rate."""
    assert len(poisson(Everyone(), 5, 2.0**-54)) == 0
    assert len(poisson(Everyone(), 5, 2.0**-53)) == 5
    above = np.nextafter(0.3, 0)
    assert len(poisson(Fixed(np.floor(0.3 * 2**53) / 2**53), 1, 0.3)) == 0
    assert len(poisson(Fixed(np.floor(above * 2**53) / 2**53 - 2.0**-53), 1, 0.3)) == 1


class Fixed(Everyone):
    """Draws one value."""

    def __init__(self, value: float) -> None:
        self._value = value

    def uniform(self, count: int) -> Floats:
        return np.full(count, self._value)


@pytest.mark.parametrize("count", [1, 2])
def test_figures_of_an_evaluation_have_noise_of_their_own(count: int) -> None:
    drawn = np.array([released([np.zeros((0, 2))] * count, 3.0, System()) for _ in range(4000)])

    assert np.abs(np.corrcoef(drawn.T) - np.eye(1 + 2 * count)).max() < 5 / np.sqrt(4000)
    assert dependence(drawn.ravel()) < LIMIT


class Unit(Everyone):
    """Noise of one deviation in every value."""

    def normal(self, deviation: int, count: int) -> Any:
        return np.full(count, deviation)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_released_of_an_evaluation_has_the_noise_that_is_charged(count: int) -> None:
    """In the units of what is released, in which a row is 1 at most: with noise, too."""
    nobody, one = [np.zeros((0, 2))] * count, [np.ones((1, 2))] * count
    silent = np.array(released(nobody, 1.0, Everyone()))

    assert not silent.any()
    assert np.linalg.norm(np.subtract(released(one, 1.0, Everyone()), silent)) <= 1 + 1e-7
    # A float32 is within 2^-24 of it.
    assert np.min(released(nobody, 0.7, Unit())) >= 0.7 * (1 - 2.0**-24)


def test_the_budget_is_judged_at_the_policys_delta(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    """A coordinator that names a large delta does not make a round cheaper."""
    spend = Spend(0.3, 1.0, 3)
    between = (epsilon([spend], 0.1) + epsilon([spend], 1e-6)) / 2
    careful = policy.model_copy(
        update={"privacy": policy.privacy.model_copy(update={"epsilon": between, "delta": 1e-6})}
    )
    trainer = Trainer(tiny_model, rows, changed(spec, privacy={"delta": 0.1}), careful, ledger)

    with pytest.raises(BudgetError, match="at delta 1e-06"):
        trainer.train("run", assignment(), start(tiny_model))

    assert ledger.charges() == []


def test_a_budget_is_not_exceeded_by_a_thousandth(ledger: Ledger) -> None:
    spend = Spend(0.3, 1.0, 3)
    costs = epsilon([spend], 1e-5)

    with pytest.raises(BudgetError):
        ledger.reserve("run", 0, spend, budget=costs * 0.999, delta=1e-5)

    assert ledger.reserve("run", 0, spend, budget=costs, delta=1e-5)


def test_every_step_of_a_round_is_charged(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    trainer = Trainer(tiny_model, rows, changed(spec, train={"steps": 5, "sampling_rate": 0.2}), policy, ledger)

    trainer.train("run", assignment(), start(tiny_model))

    assert [charge.spend for charge in ledger.charges()] == [Spend(0.2, 1.0, 5)]


def test_a_sum_of_thousands_of_clipped_examples_does_not_overflow() -> None:
    """As formed gradients and as factors: each adds a million steps, and 32 bits hold two thousand of those."""
    for formed in (True, False):
        parameter = nn.Parameter(torch.zeros(2, 3))
        tape = Tape([parameter])
        base = torch.optim.SGD([parameter], lr=0.0)
        optimizer = PrivateOptimizer(base, tape, Everyone(), noise_multiplier=1.0, clip_norm=1.0, expected_batch=1.0)
        tape.begin(5000)
        if formed:
            gradient = torch.zeros(5000, 2, 3)
            gradient[:, 0, 0] = 7.0
            tape.add(parameter, gradient)
        else:
            one = torch.tensor([7.0, 0.0, 0.0]).expand(5000, 1, 3)
            tape.add_product(parameter, torch.tensor([1.0, 0.0]).expand(5000, 1, 2), one)
        optimizer.accumulate()
        optimizer.release()
        assert parameter.grad is not None
        assert parameter.grad.ravel().tolist() == pytest.approx([5000.0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("faint", [2.0**-75, 2.0**-80, 2.0**-100])
def test_a_product_of_a_faint_and_a_strong_factor_is_clipped(faint: float) -> None:
    """The squares of one factor vanish in float32, and the other factor makes up for it."""
    parameter = nn.Parameter(torch.zeros(2, 300))
    tape = Tape([parameter])
    base = torch.optim.SGD([parameter], lr=0.0)
    optimizer = PrivateOptimizer(base, tape, Everyone(), noise_multiplier=1.0, clip_norm=1e-3, expected_batch=1.0)
    tape.begin(1)
    tape.add_product(parameter, torch.full((1, 1, 2), faint), torch.full((1, 1, 300), 2.0**-12 / faint))

    optimizer.accumulate()

    length = float(optimizer._total.double().norm())
    assert 0.99 * UNITS < length <= UNITS
