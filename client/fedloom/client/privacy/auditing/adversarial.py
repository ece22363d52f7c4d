"""The audit of an attacker who lies: hostile adapters through the real trainer, and every attack on its step.

Examples are made up, the ledger is a passing one, and nothing is sent. What the attacks on the step itself look for is
said in `attacks`; here the coordinator chooses the weights: saturated heads, under which a true sum is exactly zero,
and weights so large that gradients overflow or vanish.
"""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.privacy.auditing.attacks import (
    LIMIT,
    Attack,
    Make,
    Paired,
    correlated_noise,
    dependence,
    extreme_settings,
    low_bits,
)
from fedloom.client.privacy.auditing.audit import Silent, made_up_rows, noisy_sum
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, System
from fedloom.core.config.run import Spec
from fedloom.core.errors import ConfigError, PolicyError
from fedloom.core.privacy.spends import banded
from fedloom.core.schema import Role, Tensors

__all__ = ["adversarial"]

_STEPS = 64
_TRIALS = 50
_SLACK = 1e-3
_RATE = 1e4
"""Learning rate under traps: a step is then large beside the rounding of the largest weights here."""

_LOOSE = 10.0
"""What the trainer that is broken on purpose multiplies C by."""


def adversarial(
    model: AdapterModel,
    spec: Spec,
    *,
    steps: int = _STEPS,
    make: Make = PrivateOptimizer,
    entropy: Entropy | None = None,
) -> tuple[Attack, ...]:
    """Try each attack on a run's private step, and traps on the trainer with the model.

    Args:
        model: As the run loads it; left as it was.
        spec: The run, with its noise multiplier.
        steps: Releases that the attacks on the step look at, of 4096 values each.
        make: Makes the optimizer that the attacks on the step alone are tried on. Test seam.
        entropy: Test seam; None is the operating system's.

    Raises:
        ConfigError: The run is not private, or lacks its noise multiplier.
    """
    sigma, clip = spec.privacy.noise_multiplier, spec.privacy.clip_norm
    if not spec.privacy.enabled or sigma is None:
        raise ConfigError("only a private run with a noise multiplier can be attacked; set privacy.enabled = true")
    drawn, bands = entropy or System(), spec.privacy.noise_bands
    make = partial(make, automatic=spec.privacy.clipping == "automatic")
    return (
        correlated_noise(make, sigma, clip, steps=max(steps, bands), strategy=banded(spec), entropy=drawn),
        low_bits(make, 1.0, steps=steps, entropy=drawn),
        extreme_settings(make, sigma, clip, trials=_TRIALS, entropy=drawn),
        _trapped_example(model, spec),
        _trapped_noise(model, spec, drawn),
    )


def _traps(model: AdapterModel) -> Iterator[Tensors]:
    """Adapters that no training comes to; the last two are beyond what a default policy takes."""
    rng = np.random.default_rng(2)
    start = model.read(model.schema)
    heads = {each.name for each in model.schema.tensors if each.role == Role.HEAD and len(each.shape) == 1}
    for size in (90.0, 1000.0):
        certain = {
            name: np.where(np.arange(value.size) == 0, size, 0) for name, value in start.items() if name in heads
        }
        yield {**start, **{name: value.astype(np.float32) for name, value in certain.items()}}
    yield {name: np.zeros_like(value) for name, value in start.items()}
    for size in (30.0, 1000.0):
        yield {name: (size * rng.choice([-1, 1], value.shape)).astype(np.float32) for name, value in start.items()}


def _trapped_example(model: AdapterModel, spec: Spec) -> Attack:
    """How much one example adds to the sum under a trap, in units of C; without noise, to see it itself."""
    everyone = made_up_rows(spec)

    def longest(loose: float) -> tuple[float, int]:
        privacy = spec.privacy.model_copy(update={"clip_norm": loose * spec.privacy.clip_norm})
        run, found = spec.model_copy(update={"privacy": privacy}), [0.0]
        for trap in _traps(model):
            for gone in (0, len(everyone) - 1):  # of different labels
                others = everyone.take(np.delete(np.arange(len(everyone)), gone))
                try:
                    sums = [noisy_sum(model, rows, run, Silent(), trap, _RATE) for rows in (everyone, others)]
                except PolicyError:
                    continue
                length = float(np.linalg.norm(sums[0] - sums[1])) / spec.privacy.clip_norm
                found.append(length if math.isfinite(length) else math.inf)
        return max(found), len(found) - 1

    found, tries = longest(1.0)
    return Attack("trap weights", tries, "C", found, 1 + _SLACK, longest(_LOOSE)[0] > 1 + _SLACK)


def _trapped_noise(model: AdapterModel, spec: Spec, entropy: Entropy) -> Attack:
    """Whether the noise under traps is whole, and none of it comes again in another round."""
    rows, sigma = made_up_rows(spec), spec.privacy.noise_multiplier
    assert sigma is not None  # adversarial() has checked

    def releases(source: Entropy) -> npt.NDArray[np.float64]:
        found = []
        for trap in _traps(model):
            try:
                found += [noisy_sum(model, rows, spec, source, trap, _RATE) for _ in range(2)]
            except PolicyError:
                continue
        return np.concatenate(found) / (sigma * spec.privacy.clip_norm)

    def worst(values: npt.NDArray[np.float64]) -> float:
        return max(float((1 - values.std()) * math.sqrt(2 * len(values))), dependence(values))

    values = releases(entropy)
    return Attack(
        "noise under traps",
        len(values),
        "standard errors",
        worst(values),
        LIMIT,
        worst(releases(Paired(entropy))) > LIMIT,
    )
