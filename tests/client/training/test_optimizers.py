"""What a trainer tells its optimiser, and what an audit makes of it."""

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.optimizers.api import noise_std
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.audit import Silent, noisy_sum
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.privacy.gaussian import Integers
from tests.client.rounds import Floats, assignment, changed, start


class Nobody:
    """Samples no example; noise of a seed."""

    def __init__(self) -> None:
        self.seeded = Seeded(1)

    def uniform(self, count: int) -> Floats:
        return np.ones(count)

    def normal(self, deviation: int, count: int) -> Integers:
        return self.seeded.normal(deviation, count)


def test_the_noise_it_is_told_of_is_that_of_a_step_without_examples(
    tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    run = changed(spec, train={"steps": 1, "learning_rate": 1.0}, privacy={"clip_norm": 0.5})
    told = noise_std(run, policy.data.declared_examples)
    trainer = Trainer(tiny_model, rows, run, policy, ledger, entropy_for=lambda _: Nobody())

    delta = trainer.train("run", assignment(), start(tiny_model)).delta

    values = np.concatenate([each.ravel() for each in delta.values()]).astype(np.float64)
    assert told == pytest.approx(values.std(), rel=4 / np.sqrt(2 * len(values)))


def test_without_privacy_it_is_told_of_none(plain: Spec) -> None:
    assert noise_std(plain, 40) == 0.0


def test_an_audit_looks_at_sums_whatever_the_runs_optimizer_makes_of_them(
    tiny_model: AdapterModel, rows: Rows, spec: Spec
) -> None:
    """The audit steps by SGD, which has none of the options of another optimiser."""
    other = changed(spec, train={"optimizer": "adamw", "noise_correction": True, "momentum": 0.5, "weight_decay": 0.1})

    np.testing.assert_array_equal(
        noisy_sum(tiny_model, rows, other, Silent()), noisy_sum(tiny_model, rows, spec, Silent())
    )
