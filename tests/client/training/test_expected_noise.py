"""The noise that is expected of an update against what the private trainer sends."""

import numpy as np
import pytest

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.expected_noise import update_noise
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.schema import Role
from tests.client.rounds import assignment, changed


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"momentum": 0.8},
        {"head_learning_rate": 0.05, "schedule": "linear"},
        {"ema": 0.5},
        {"ema": 0.9, "momentum": 0.8},
    ],
)
def test_an_update_of_noise_has_the_variance_that_is_expected(
    train: dict[str, object], tiny_model: AdapterModel, rows: Rows, spec: Spec, policy: Policy, ledger: Ledger
) -> None:
    # Gradients of norm 1e-3 at most under noise of 1: nothing but noise is left.
    run = changed(spec, privacy={"noise_multiplier": 1000.0, "clip_norm": 1e-3}, train={"steps": 6, **train})
    start = tiny_model.read(tiny_model.schema)
    trainer = Trainer(tiny_model, rows, run, policy, ledger, entropy_for=lambda _: Seeded(3))
    delta = trainer.train("run", assignment(round=1), start).delta

    declared = policy.data.declared_examples
    assert declared is not None
    expected = update_noise(run, run.train, 1, declared)

    assert expected is not None
    specs = tiny_model.schema.tensors
    for heads, variance in zip((False, True), expected, strict=True):
        values = np.concatenate([delta[s.name].ravel() for s in specs if (s.role == Role.HEAD) is heads])
        # A mean of n squares has a relative standard deviation of sqrt(2 / n); 5 of them.
        assert np.mean(values.astype(np.float64) ** 2) == pytest.approx(variance, rel=5 * np.sqrt(2 / len(values)))


def test_without_momentum_it_is_the_sum_over_the_steps(spec: Spec) -> None:
    run = changed(spec, train={"steps": 7, "learning_rate": 0.2, "head_learning_rate": 0.4})

    found = update_noise(run, run.train, 0, 50)

    each = run.privacy.noise_multiplier * run.privacy.clip_norm / (run.train.sampling_rate * 50)  # type: ignore[operator]
    assert found == pytest.approx((7 * (0.2 * each) ** 2, 7 * (0.4 * each) ** 2))


@pytest.mark.parametrize(
    ("train", "declared"), [({"optimizer": "adam"}, 50), ({"proximal_mu": 0.1}, 50), ({"smoothing": True}, 50), ({}, 0)]
)
def test_what_has_no_closed_form_is_not_known(spec: Spec, train: dict[str, object], declared: int) -> None:
    run = changed(spec, train=train)

    assert update_noise(run, run.train, 0, declared) is None


def test_a_run_without_privacy_has_none(spec: Spec) -> None:
    open_run = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})

    assert update_noise(open_run, open_run.train, 0, 50) is None
