"""A round with noise bands: its training by hand, who may be in which step, what it is charged and who refuses it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedloom.client.data.rows import Rows
from fedloom.client.data.tokens import collate, encode
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.optimizers.api import noise_std
from fedloom.client.policy import Policy, check_spec
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training import gradients as gradients_module
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError, ConfigError, PolicyError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.banded import Banded
from fedloom.core.privacy.gaussian import deviation, longest
from fedloom.core.schema import Array
from tests.client.rounds import ALL, assignment, changed, start


@pytest.fixture
def bands(spec: Spec) -> Spec:
    """Five steps over two bands: 0.4 of a group in each, three turns of the first group."""
    return changed(spec, train={"steps": 5, "sampling_rate": 0.2}, privacy={"noise_bands": 2})


def by_hand(model: AdapterModel, rows: Rows, spec: Spec, values: dict[str, Array]) -> dict[str, Array]:
    """Cyclic Poisson samples, whole gradients, and noise through the dense inverse of C."""
    model.load(values)
    parameters = model.trainable(ALL)
    entropy, train, privacy = Seeded(7, 0), spec.train, spec.privacy
    assert privacy.noise_multiplier is not None
    encoded = encode(rows, model.tokenizer, spec.model.max_length)
    width, count = sum(p.numel() for p in parameters), privacy.noise_bands
    inverse = np.linalg.inv(Banded(train.steps, count, train.momentum).dense())
    groups = np.floor(entropy.uniform(len(rows)) * count)
    draws: list[Any] = []
    for step in range(train.steps):
        drawn = entropy.uniform(len(rows)) < count * train.sampling_rate
        total = torch.zeros(width, dtype=torch.float64)
        for i in np.flatnonzero(drawn & (groups == step % count)):
            one = collate(encoded, np.array([i]), model.tokenizer.pad_token_id)
            loss = F.cross_entropy(model.logits(one), one["labels"])
            flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).double()
            total += flat * min(1.0, privacy.clip_norm / float(flat.norm()))
        draws.append(entropy.normal(deviation(privacy.noise_multiplier), width) / longest(width, count))
        total += torch.from_numpy(inverse[step, : step + 1] @ np.stack(draws)) * privacy.clip_norm
        move = (total * train.learning_rate / (train.sampling_rate * 40)).float()
        with torch.no_grad():
            for p, part in zip(parameters, torch.split(move, [p.numel() for p in parameters]), strict=True):
                p.sub_(part.view_as(p))
    after = model.read(model.schema)
    return {name: after[name] - values[name] for name in values}


def test_a_round_equals_one_written_by_hand(
    tiny_model: AdapterModel, rows: Rows, bands: Spec, policy: Policy, ledger: Ledger
) -> None:
    values = start(tiny_model)
    expected = by_hand(tiny_model, rows, bands, values)

    trainer = Trainer(tiny_model, rows, bands, policy, ledger, entropy_for=lambda number: Seeded(7, number))
    delta = trainer.train("run", assignment(), values).delta

    for name, value in expected.items():
        np.testing.assert_allclose(delta[name], value, rtol=0, atol=2e-5)


def test_a_step_samples_only_from_its_group(
    tiny_model: AdapterModel,
    rows: Rows,
    bands: Spec,
    policy: Policy,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the system's own entropy: steps that are not a whole number of bands apart have no example in common."""
    rounds: list[list[set[int]]] = []

    def noting(self: Trainer, optimizer: Any, sample: Any) -> None:
        rounds[-1].append(set(sample.tolist()))

    monkeypatch.setattr(Trainer, "accumulate", noting)
    trainer = Trainer(tiny_model, rows, changed(bands, train={"sampling_rate": 0.5}), policy, ledger)
    firsts = []
    for again in range(2):
        rounds.append([])
        trained = trainer.train("run", assignment(round=again), start(tiny_model))
        trainer.release(trained.charge, "0" * 64)
        even, odd = (set.union(*rounds[-1][group::2]) for group in range(2))
        assert not even & odd
        assert even | odd == set(range(len(rows))), "at rate 1/2 everybody of the group is in each of its steps"
        firsts.append(even)
    assert firsts[0] != firsts[1], "groups are drawn anew in each round"


def test_the_ledger_is_charged_for_the_turns_of_one_group(
    tiny_model: AdapterModel, rows: Rows, bands: Spec, policy: Policy, ledger: Ledger
) -> None:
    trainer = Trainer(tiny_model, rows, bands, policy, ledger, entropy_for=lambda number: Seeded(7, number))

    trainer.train("run", assignment(), start(tiny_model))

    (charge,) = ledger.charges()
    assert charge.spend == Spend(0.4, 1.0, 3)
    assert charge.noise_bands == 2
    assert ledger.epsilon(1e-3) == epsilon([Spend(0.4, 1.0, 3)], 1e-3)


def test_a_round_that_is_cut_off_is_charged_whole(
    tiny_model: AdapterModel, rows: Rows, bands: Spec, policy: Policy, ledger: Ledger
) -> None:
    class Stopped(Exception):
        pass

    calls = iter([None, None])

    def stop() -> None:
        if next(calls, "over") == "over":
            raise Stopped

    trainer = Trainer(tiny_model, rows, bands, policy, ledger)
    with pytest.raises(Stopped):
        trainer.train("run", assignment(), start(tiny_model), stop)

    assert ledger.spends() == [Spend(0.4, 1.0, 3)]


def test_the_budget_is_judged_by_what_bands_cost(
    tiny_model: AdapterModel, rows: Rows, bands: Spec, policy: Policy, ledger: Ledger
) -> None:
    """What the steps would cost at their own rate is not enough."""
    delta = policy.privacy.delta
    cheap, dear = epsilon([Spend(0.2, 1.0, 3)], delta), epsilon([Spend(0.4, 1.0, 3)], delta)
    budget = policy.privacy.model_copy(update={"epsilon": (cheap + dear) / 2})
    trainer = Trainer(tiny_model, rows, bands, policy.model_copy(update={"privacy": budget}), ledger)

    with pytest.raises(BudgetError, match=f"bring epsilon to {dear:.4f}"):
        trainer.train("run", assignment(), start(tiny_model))


def test_a_sites_highest_rate_is_that_of_a_turn(bands: Spec, policy: Policy) -> None:
    strict = policy.privacy.model_copy(update={"max_sampling_rate": 0.3})
    check_spec(policy, bands)

    with pytest.raises(PolicyError, match=r"sampling rate 0\.4 over 2 noise bands \(at most 0\.3\)"):
        check_spec(policy.model_copy(update={"privacy": strict}), bands)


def test_a_spec_that_was_made_with_other_bands_is_refused(bands: Spec, policy: Policy) -> None:
    """As a spec would be that no file was read into."""
    wrong = bands.model_copy(update={"privacy": bands.privacy.model_copy(update={"noise_bands": 6})})

    with pytest.raises(PolicyError, match=r"noise_bands = 6 is more than the train\.steps = 5"):
        check_spec(policy, wrong)


def test_builds_that_know_no_bands_refuse_them(bands: Spec) -> None:
    """Unknown keys are refused, so that no such build trains and charges a run with bands as one without."""
    text = bands.model_dump_json().replace("noise_bands", "noise_bands_of_later")

    with pytest.raises(ConfigError, match=r"unknown key 'privacy\.noise_bands_of_later'"):
        Spec.from_json(text)


def test_an_optimiser_is_told_what_noise_its_steps_have(bands: Spec) -> None:
    fresh = changed(bands, privacy={"noise_bands": 1})
    rows = np.linalg.norm(np.linalg.inv(Banded(5, 2).dense()), axis=1)

    assert noise_std(bands, 40) == pytest.approx(np.sqrt((rows**2).mean()) * noise_std(fresh, 40), rel=1e-3)


def test_the_step_with_bands_is_tried_before_a_run_is_joined(
    tiny_model: AdapterModel, rows: Rows, bands: Spec, policy: Policy, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gradients_module, "rehearse", lambda *settings: asked.append(settings))

    Trainer(tiny_model, rows, bands, policy, ledger)

    assert asked == [(1.0, 0.7, Banded(5, 2), False, tiny_model.device)]
