"""An audit passes the mechanism as it is, and refutes it with any of the faults that matter."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.auditing import audit as module
from fedloom.client.privacy.auditing.audit import Audit, Check, audit
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, Seeded
from fedloom.client.training import gradients as gradients_module
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.gaussian import UNITS

pytestmark = pytest.mark.slow

DELTA = 1e-5
FULL = bool(os.environ.get("FEDLOOM_PROVE"))
SEEDS = range(100) if FULL else range(1)
"""A right mechanism is refuted in one audit in a hundred; which seeds do so is fixed."""


class NoNoise(PrivateOptimizer):
    def __init__(self, *arguments: Any, noise_multiplier: float, **rest: Any) -> None:
        super().__init__(*arguments, noise_multiplier=0.0, **rest)


class LittleNoise(PrivateOptimizer):
    def __init__(self, *arguments: Any, noise_multiplier: float, **rest: Any) -> None:
        super().__init__(*arguments, noise_multiplier=0.8 * noise_multiplier, **rest)


class MuchNoise(PrivateOptimizer):
    """Private, but deaf to how much noise it is asked for."""

    def __init__(self, *arguments: Any, noise_multiplier: float, **rest: Any) -> None:
        super().__init__(*arguments, noise_multiplier=1000.0, **rest)


class Sums(PrivateOptimizer):
    """Keeps the sum of a microbatch's gradients as a subclass says."""

    def clip_and_accumulate(self, real: int | None = None) -> None:
        self._total += (self.total(self.tape.flat) * (UNITS / self.max_grad_norm)).round().long()

    def total(self, flat: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Unclipped(Sums):
    def total(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.sum(0)


class ClipsTheSum(Sums):
    def total(self, flat: torch.Tensor) -> torch.Tensor:
        total = flat.sum(0)
        clipped: torch.Tensor = total * (self.max_grad_norm / (total.norm() + 1e-6)).clamp(max=1.0)
        return clipped


class ClipsLoosely(Sums):
    """Lets an example have half as much again as it may: too little for sixteen noisy trials to show."""

    def total(self, flat: torch.Tensor) -> torch.Tensor:
        factors = (1.5 * self.max_grad_norm / (flat.norm(dim=1) + 1e-6)).clamp(max=1.0)
        total: torch.Tensor = factors @ flat
        return total


class ClipsEachTensor(Sums):
    """Each tensor of each example to norm C, so that an example has the norm of all of them."""

    def total(self, flat: torch.Tensor) -> torch.Tensor:
        parts = [flat[:, columns] for columns in self.tape.columns.values()]
        factors = [(self.max_grad_norm / (part.norm(dim=1) + 1e-6)).clamp(max=1.0) for part in parts]
        return torch.cat([factor @ part for factor, part in zip(factors, parts, strict=True)])


class LastTensorUnclipped(Sums):
    """The head left out of the norm."""

    def total(self, flat: torch.Tensor) -> torch.Tensor:
        last = self.tape.columns[self.tape.parameters[-1]]
        factors = (self.max_grad_norm / (flat[:, : last.start].norm(dim=1) + 1e-6)).clamp(max=1.0)
        scaled: torch.Tensor = factors[:, None] * flat
        scaled[:, last] = flat[:, last]
        return scaled.sum(0)


class SkipsEmptySteps(PrivateOptimizer):
    def release(self, pull: Any = ()) -> None:
        if bool(self._total.any()):
            super().release(pull)
            return
        for parameter in self.tape.parameters:
            parameter.grad = torch.zeros_like(parameter)


def audited(model: AdapterModel, spec: Spec, make: Any = PrivateOptimizer, seed: int = 1) -> dict[str, Check]:
    result = audit(model, spec, DELTA, trials=1000, make=make, entropy=Seeded(seed))
    return {check.name: check for check in result.checks}


def one_step(model: AdapterModel, make: Any, seed: int = 1) -> Check:
    """The check alone, at noise multiplier 1."""
    shapes = [parameter.detach() for parameter in model.trainable(model.schema.roles)]
    return module._one_step(module._Mechanism(make, 1.0, 0.7, Seeded(seed)), shapes, 1000, DELTA, 0.99)


def sampled_steps(spec: Spec, make: Any, seed: int = 1) -> Check:
    """The check alone, at noise multiplier 1."""
    return module._sampled_steps(module._Mechanism(make, 1.0, 0.7, Seeded(seed)), spec, 400, DELTA, 0.99)


def through_the_model(model: AdapterModel, spec: Spec) -> Check:
    """The check alone."""
    return module._through_the_model(model, spec, Seeded(1), DELTA, 0.99)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_the_mechanism_as_it_is_passes(tiny_model: AdapterModel, spec: Spec) -> None:
    refuted = 0
    for seed in SEEDS:
        checks = audited(tiny_model, spec, seed=seed)
        refuted += any(check.verdict == "VIOLATION" for check in checks.values())
        assert all(check.control_seen for check in checks.values())
        assert checks["one step"].lower > 0.5 * checks["one step"].claim

    # One in a hundred at most, and in a hundred audits more than five with probability 0.0005.
    assert refuted <= (5 if FULL else 0)


@pytest.mark.parametrize("fault", [NoNoise, LittleNoise, Unclipped, ClipsTheSum, ClipsEachTensor, LastTensorUnclipped])
def test_a_faulty_step_is_refuted(fault: Any, tiny_model: AdapterModel) -> None:
    check = one_step(tiny_model, fault)

    assert check.verdict == "VIOLATION"
    assert check.lower > check.claim > 0
    assert check.noise_at_most < 1.0


@pytest.mark.parametrize("fault", [NoNoise, Unclipped, SkipsEmptySteps])
def test_faulty_sampled_steps_are_refuted(fault: Any, spec: Spec) -> None:
    check = sampled_steps(spec, fault)

    assert check.verdict == "VIOLATION"
    assert check.lower > check.claim > 0
    assert check.noise_at_most < 1.0


def test_the_bound_is_above_zero_when_the_noise_is_cut_and_has_no_limit_when_it_is_off(
    tiny_model: AdapterModel, spec: Spec
) -> None:
    assert 0 < one_step(tiny_model, LittleNoise).lower < 10
    assert one_step(tiny_model, NoNoise).lower > 1e6
    assert sampled_steps(spec, NoNoise).lower > 0


def test_an_example_that_is_always_sampled_is_noticed(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    def everyone(_: Entropy, count: int, rate: float) -> npt.NDArray[np.int64]:
        return np.arange(count)

    assert sampled_steps(spec, PrivateOptimizer).verdict == "consistent"
    monkeypatch.setattr(module, "poisson", everyone)

    assert sampled_steps(spec, PrivateOptimizer).verdict == "VIOLATION"


def test_noise_bands_are_attacked_by_blocks_and_an_account_at_the_rate_of_a_step_is_refuted(spec: Spec) -> None:
    """Four bands at rate 0.2: sampled at 0.8 in every fourth step, whose noise the attacker puts together again."""
    train = {"steps": 12, "sampling_rate": 0.2, "momentum": 0.5}
    privacy = spec.privacy.model_dump() | {"noise_bands": 4}
    bands = Spec.model_validate(spec.model_dump() | {"train": train, "privacy": privacy})

    check = sampled_steps(bands, PrivateOptimizer)

    assert (check.steps, check.sampling_rate) == (3, 0.8)
    assert check.verdict == "consistent"
    assert check.lower > epsilon([Spend(0.2, 1.0, 3)], DELTA)


@pytest.mark.parametrize("fault", [NoNoise, Unclipped, ClipsLoosely])
def test_a_fault_that_only_the_trainer_has_is_found_through_the_model(
    fault: Any, tiny_model: AdapterModel, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"clip_norm": 0.01})})
    assert through_the_model(tiny_model, tight).verdict == "consistent"
    monkeypatch.setattr(gradients_module, "PrivateOptimizer", fault)

    check = through_the_model(tiny_model, tight)

    assert check.verdict == "VIOLATION"


@pytest.mark.parametrize(
    ("architecture", "task"), [("bert", "token-classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")]
)
def test_other_tasks_are_attacked_through_the_model_too(
    architecture: str, task: str, build_task: Any, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_task(architecture, task)
    of_task = {"task": task, "max_length": 24} | ({"labels": (), "head": "frozen"} if task == "causal-lm" else {})
    tight = {"model": spec.model.model_dump() | of_task, "privacy": spec.privacy.model_dump() | {"clip_norm": 0.01}}
    run = Spec.model_validate(spec.model_dump() | tight)

    found = through_the_model(model, run)
    assert found.verdict == "consistent"
    assert found.control_seen
    monkeypatch.setattr(gradients_module, "PrivateOptimizer", ClipsLoosely)

    assert through_the_model(model, run).verdict == "VIOLATION"


def test_a_claim_that_is_too_small_is_refuted(tiny_model: AdapterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "epsilon", lambda spends, delta: 0.8 * epsilon(spends, delta))

    assert one_step(tiny_model, PrivateOptimizer).verdict == "VIOLATION"


def test_an_audit_that_could_not_have_seen_anything_says_so(tiny_model: AdapterModel, spec: Spec) -> None:
    result = audit(tiny_model, spec, DELTA, trials=100, make=MuchNoise, entropy=Seeded(1))

    assert [check.verdict for check in result.checks[:2]] == ["blind", "blind"]
    assert result.verdict == "blind"


def test_the_worst_check_decides() -> None:
    def check(lower: float, seen: bool) -> Check:
        return Check("any", 100, 1, 1.0, claim=1.0, lower=lower, noise_at_most=1.0, control_seen=seen)

    def verdict(*checks: Check) -> str:
        return Audit(checks, DELTA, 1.0, 1.0, 10).verdict

    assert verdict(check(1.0, True), check(0.0, True)) == "consistent"
    assert verdict(check(1.0, True), check(0.0, False)) == "blind"
    assert verdict(check(1.1, False), check(0.0, False), check(0.0, True)) == "VIOLATION"


def test_an_audit_leaves_the_model_as_it_was(tiny_model: AdapterModel, spec: Spec) -> None:
    before = tiny_model.read(tiny_model.schema)

    audit(tiny_model, spec, DELTA, trials=100)

    for name, value in tiny_model.read(tiny_model.schema).items():
        np.testing.assert_array_equal(value, before[name])


def test_what_cannot_be_audited_is_refused(tiny_model: AdapterModel, spec: Spec) -> None:
    plain = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})})

    with pytest.raises(ConfigError, match=r"only a private run .* set privacy\.enabled = true"):
        audit(tiny_model, plain, DELTA)
    with pytest.raises(ConfigError, match="99 trials show nothing; use at least 100"):
        audit(tiny_model, spec, DELTA, trials=99)


@pytest.mark.parametrize(
    ("rounds", "steps", "rate", "audited_steps"),
    [(10, 10, 0.02, 10), (10, 500, 0.02, 20), (100, 10, 0.004, 50), (100, 10, 1e-4, 100), (1, 3, 0.004, 3)],
)
def test_so_many_steps_are_sampled_that_the_canary_is_probably_in_one(
    rounds: int, steps: int, rate: float, audited_steps: int, spec: Spec
) -> None:
    train = spec.train.model_copy(update={"steps": steps, "sampling_rate": rate})
    chosen = spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": rounds}), "train": train})

    assert module._steps(chosen) == audited_steps
