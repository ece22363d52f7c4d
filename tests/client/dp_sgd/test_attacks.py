"""The adversarial audit passes the mechanism as it is, and sees each fault that it looks for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing import adversarial as adversarial_module
from fedloom.client.privacy.auditing import attacks as module
from fedloom.client.privacy.auditing.adversarial import adversarial
from fedloom.client.privacy.auditing.attacks import (
    LIMIT,
    Attack,
    FloatNoise,
    Paired,
    correlated_noise,
    dependence,
    extreme_settings,
    low_bits,
    rehearse,
)
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Seeded
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training import gradients as gradients_module
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError, ModelError
from fedloom.core.privacy.gaussian import Integers
from tests.attacks.float_mechanism import FloatMechanism
from tests.client.rounds import Floats


class Repeating:
    """Real noise that comes again in a way that a subclass says."""

    def __init__(self) -> None:
        self._entropy = Seeded(1)
        self._kept: dict[int, Integers] = {}

    def uniform(self, count: int) -> Floats:
        return self._entropy.uniform(count)

    def normal(self, deviation: int, count: int) -> Integers:
        raise NotImplementedError


class InEveryStep(Repeating):
    def normal(self, deviation: int, count: int) -> Integers:
        return self._kept.setdefault(count, self._entropy.normal(deviation, count))


class InEveryOtherStep(Repeating):
    """Subtracted in place of added the second time."""

    def normal(self, deviation: int, count: int) -> Integers:
        return (
            -self._kept.pop(count) if count in self._kept else self._kept.setdefault(count, self._new(deviation, count))
        )

    def _new(self, deviation: int, count: int) -> Integers:
        return self._entropy.normal(deviation, count)


class InBlocks(Repeating):
    def normal(self, deviation: int, count: int) -> Integers:
        return np.resize(self._entropy.normal(deviation, 1024), count)


class Mirrored(Repeating):
    def normal(self, deviation: int, count: int) -> Integers:
        half = self._entropy.normal(deviation, count // 2)
        return np.concatenate([half, half[::-1]])


class SharedSizes(Repeating):
    """The second half has sizes of the first and signs of its own."""

    def normal(self, deviation: int, count: int) -> Integers:
        half = self._entropy.normal(deviation, count // 2)
        return np.concatenate([half, half * np.sign(self._entropy.normal(1000, count // 2))])


class FewValues(Repeating):
    """Five hundred values, in random order."""

    def normal(self, deviation: int, count: int) -> Integers:
        few = self._kept.setdefault(0, self._entropy.normal(deviation, 500))
        return np.take(few, (self._entropy.uniform(count) * len(few)).astype(int))


class Narrow(Repeating):
    def normal(self, deviation: int, count: int) -> Integers:
        return self._entropy.normal(int(0.95 * deviation), count)


@pytest.mark.parametrize(
    "fault",
    [InEveryStep, InEveryOtherStep, InBlocks, Mirrored, SharedSizes, FewValues, Narrow],
    ids=lambda c: c.__name__,
)
def test_noise_that_can_be_subtracted_is_seen(fault: Any) -> None:
    found = correlated_noise(PrivateOptimizer, 1.0, 0.7, steps=4, entropy=fault())

    assert found.verdict == "VIOLATION"


@pytest.mark.parametrize("sigma", [0.02, 0.9, 1.9, 50.0])
@pytest.mark.parametrize("clip_norm", [1e-6, 1.0, 1e6])
def test_the_mechanism_as_it_is_withstands_every_attack_on_its_step(sigma: float, clip_norm: float) -> None:
    attacks = (
        correlated_noise(PrivateOptimizer, sigma, clip_norm, steps=4, entropy=Seeded(1)),
        low_bits(PrivateOptimizer, clip_norm, steps=8, entropy=Seeded(1)),
        extreme_settings(PrivateOptimizer, sigma, clip_norm, trials=4, entropy=Seeded(1)),
    )

    assert [each.verdict for each in attacks] == ["consistent"] * 3


@pytest.mark.parametrize("make", [FloatNoise, FloatMechanism])
def test_float_noise_is_seen(make: Any) -> None:
    assert low_bits(make, 1.0, steps=8).verdict == "VIOLATION"
    assert extreme_settings(make, 1.0, 1.0, trials=4).verdict == "VIOLATION"


class Loose(PrivateOptimizer):
    """Lets an example have half as much again as it may."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._longest *= 1.5

    @property
    def clipped_sum(self) -> torch.Tensor:
        return super().clipped_sum * 1.5


def test_an_example_that_weighs_too_much_is_seen() -> None:
    assert extreme_settings(Loose, 0.1, 1.0, trials=16).verdict == "VIOLATION"


def test_an_attack_that_sees_no_fault_is_blind() -> None:
    assert Attack("x", 1, "C", 0.0, 1.0, control_seen=False).verdict == "blind"
    assert Attack("x", 1, "C", float("nan"), 1.0, control_seen=True).verdict == "VIOLATION"


def test_values_of_one_size_depend_on_each_other() -> None:
    assert dependence(np.zeros(100)) > LIMIT


def test_traps_through_the_real_trainer_show_nothing(tiny_model: AdapterModel, spec: Spec) -> None:
    before = tiny_model.read(tiny_model.schema)

    found = adversarial(tiny_model, spec, steps=8, entropy=Seeded(1))

    assert {each.name: each.verdict for each in found} == dict.fromkeys(
        ("correlated noise", "low bits", "extreme settings", "trap weights", "noise under traps"), "consistent"
    )
    for name, value in tiny_model.read(tiny_model.schema).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_trainer_that_clips_at_too_much_is_seen(
    tiny_model: AdapterModel, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "PrivateOptimizer", Loose)

    assert adversarial_module._trapped_example(tiny_model, spec).verdict == "VIOLATION"


def test_noise_that_comes_again_in_another_round_is_seen(tiny_model: AdapterModel, spec: Spec) -> None:
    assert adversarial_module._trapped_noise(tiny_model, spec, InEveryStep()).verdict == "VIOLATION"


def test_only_a_private_run_is_attacked(tiny_model: AdapterModel, spec: Spec) -> None:
    for change in ({"enabled": False}, {"noise_multiplier": None}):
        with pytest.raises(ConfigError, match="only a private run"):
            adversarial(tiny_model, spec.model_copy(update={"privacy": spec.privacy.model_copy(update=change)}))


@pytest.mark.parametrize("fault", [FloatMechanism, Loose])
def test_a_client_whose_step_fails_joins_no_private_run(
    fault: Any,
    tiny_model: AdapterModel,
    rows: Rows,
    spec: Spec,
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PrivateOptimizer", fault)
    little = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"noise_multiplier": 0.03})})
    rehearse.cache_clear()
    with Ledger(tmp_path, "sha256:" + "0" * 64) as ledger:
        with pytest.raises(ModelError, match="does not withstand an attack by"):
            Trainer(tiny_model, rows, little, policy, ledger)
        assert ledger.charges() == []
    Trainer(
        tiny_model,
        rows,
        little.model_copy(update={"privacy": spec.privacy.model_copy(update={"enabled": False})}),
        policy,
        None,
    )


def test_a_wrong_pairing_of_noise_is_what_the_control_makes() -> None:
    values = Paired(Seeded(1)).normal(1000, 7)

    assert values.tolist()[4:] == (-values[:3]).tolist()
