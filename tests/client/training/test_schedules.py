"""Schedules of the learning rate against torch's."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.config.schedules import share_of_rate
from fedloom.core.errors import ConfigError
from tests.client.rounds import assignment, changed, start


def ours(schedule: str, warmup: int, rounds: int) -> list[float]:
    train = TrainSection.model_validate({"steps": 1, "sampling_rate": 1, "schedule": schedule, "warmup": warmup})
    return [share_of_rate(train, round, rounds) for round in range(rounds)]


def torchs(schedule: str, warmup: int, rounds: int) -> list[float]:
    """The rates of torch's scheduler, stepped once a round; a rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    left = rounds - warmup
    made: dict[str, LRScheduler] = {}
    if schedule == "one-cycle":
        share = (warmup + 1) / (rounds + 1)
        made[schedule] = OneCycleLR(optimizer, 1.0, total_steps=rounds + 1, pct_start=share, cycle_momentum=False)
    elif schedule == "linear":
        made[schedule] = LinearLR(optimizer, 1.0, 0.0, left)
    elif schedule == "cosine":
        made[schedule] = CosineAnnealingLR(optimizer, left)
    else:
        made[schedule] = ConstantLR(optimizer, 1.0)
    scheduler = made[schedule]
    if warmup and schedule != "one-cycle":
        rise = LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        scheduler = SequentialLR(optimizer, [rise, scheduler], [warmup])
    rates = []
    for _ in range(rounds):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's sequence steps its parts in a way that it deprecates itself
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [
        *((schedule, warmup) for schedule in ("constant", "linear", "cosine") for warmup in (0, 1, 3)),
        ("one-cycle", 1),
        ("one-cycle", 3),
    ],
)
@pytest.mark.parametrize("rounds", [4, 10])
def test_rates_are_torchs(schedule: str, warmup: int, rounds: int) -> None:
    found = ours(schedule, warmup, rounds)

    np.testing.assert_allclose(found, torchs(schedule, warmup, rounds), rtol=1e-9, atol=1e-12)
    assert all(0 < rate <= 1 for rate in found)
    assert found[warmup] == 1.0


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_round_is_trained_at_its_share_of_both_rates(
    warmup: int, tiny_model: AdapterModel, rows: Rows, plain: Spec, policy: Policy
) -> None:
    """One step of SGD from the same values: the change is the rate times the same gradient."""
    values = start(tiny_model)
    train = {"steps": 1, "sampling_rate": 1.0, "schedule": "cosine", "warmup": warmup, "head_learning_rate": 0.1}
    run = changed(plain, run={"rounds": 6}, train=train)
    flat = changed(run, train={"schedule": "constant", "warmup": 0})

    whole = Trainer(tiny_model, rows, flat, policy, None).train("run", assignment(round=2), values).delta
    delta = Trainer(tiny_model, rows, run, policy, None).train("run", assignment(round=2), values).delta

    share = (1 + np.cos(np.pi / 3)) / 2 if warmup == 0 else 3 / 4
    for name in values:
        np.testing.assert_allclose(delta[name], share * whole[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"warmup": 2}, r"train\.warmup = 2 leaves no round .* below run\.rounds = 2"),
        ({"schedule": "one-cycle"}, r"rises before it falls; set train\.warmup"),
    ],
)
def test_a_warm_up_that_does_not_fit_is_refused(train: dict[str, object], message: str, plain: Spec) -> None:
    with pytest.raises(ConfigError, match=message):
        Spec.from_json(plain.model_copy(update={"train": plain.train.model_copy(update=train)}).model_dump_json())


def test_a_run_without_the_new_keys_is_told_as_before(plain: Spec) -> None:
    """Builds that know none refuse keys they do not know."""
    told = plain.model_dump_json()
    other = changed(plain, train={"warmup": 1, "ema": 0.5})

    assert "warmup" not in told
    assert "ema" not in told
    assert Spec.from_json(other.model_dump_json()) == other
