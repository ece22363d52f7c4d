"""An audit of the mechanism that a run file asks for: how well can an attacker see one example in what it releases?

The attacker is the strongest that the guarantee speaks of. It knows everything but one example, sees every noisy sum,
and has chosen that example, the canary: its gradient lies along one known direction, with an equal share of every
trained tensor, and is a hundred times longer than the clipping norm C. Clipped, it has norm C, all that one example
may have; a layer clipped by itself or not at all shows as a longer one. The rest of the batch points the other way, at
norm C each, so that clipping the sum or the mean in place of each example shows as well.

A bound below the claim is consistent with it. It is no proof of privacy: another canary might have shown more.
"""

import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedloom.client.data.layout import Layout
from fedloom.client.data.load import assembled, identified
from fedloom.client.data.rows import Rows
from fedloom.client.models.adapter_model import AdapterModel
from fedloom.client.policy import Policy
from fedloom.client.privacy.auditing.attacks import Attack, Make, Verdict
from fedloom.client.privacy.auditing.lower_bounds import Family, gaussian_epsilon, least_separation, rates
from fedloom.client.privacy.dp_sgd.grad_sample import Tape
from fedloom.client.privacy.dp_sgd.optimizer import PrivateOptimizer
from fedloom.client.privacy.dp_sgd.rng import Entropy, System, poisson
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.training.trainer import Trainer
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import Spend, epsilon
from fedloom.core.privacy.banded import Banded, participation
from fedloom.core.privacy.gaussian import Integers
from fedloom.core.schema import Tensors
from fedloom.proto.messages import Assignment

__all__ = ["CONFIDENCE", "LEAST_TRIALS", "Audit", "Check", "Silent", "audit", "made_up_rows", "noisy_sum"]

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.99
"""Of all bounds of one audit together: a right mechanism is called a violation in at most one audit in a hundred."""

LEAST_TRIALS = 100
"""Fewer could not refute a sampled mechanism even without noise; some settings need several times as many."""

_LONG = 100.0  # the canary's raw length in clipping norms
_CUT = 0.1  # share of the noise that the positive control keeps
_WIDTH = 8  # values in the stand-in adapter of sampled steps: clipping and noise do not depend on how many there are
_FEW_OR_MANY = (20, 100)  # sampled steps: twenty say enough when the canary is in one of five trials; at most a hundred
_MODEL_TRIALS = 16  # through the whole trainer and the model's backward pass


@dataclass(frozen=True)
class Check:
    """One part of an audit."""

    name: str
    """one step, sampled steps, or whole trainer."""
    trials: int
    """Independent attempts with the canary, and as many without."""
    steps: int
    sampling_rate: float
    claim: float
    """Epsilon that the accountant gives to these steps at the audit's delta."""
    lower: float
    """Lower bound on epsilon at the audit's delta, infinite when nothing hides the canary."""
    noise_at_most: float
    """The most noise, over C, that explains what was seen; the claim is the noise multiplier."""
    control_seen: bool
    """Whether the same check refutes the claim when the noise is cut on purpose."""

    @property
    def verdict(self) -> Verdict:
        """A violation if the bound exceeds the claim; blind if it could not have."""
        if self.lower > self.claim:
            return "VIOLATION"
        return "consistent" if self.control_seen else "blind"


@dataclass(frozen=True)
class Audit:
    """The result for one run file."""

    checks: tuple[Check, ...]
    delta: float
    noise_multiplier: float
    clip_norm: float
    parameters: int
    """Trained values."""
    attacks: tuple[Attack, ...] = ()
    """What `adversarial` adds."""

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks' and the attacks'."""
        found = {*(check.verdict for check in self.checks), *(attack.verdict for attack in self.attacks)}
        return "VIOLATION" if "VIOLATION" in found else "blind" if "blind" in found else "consistent"


def audit(
    model: AdapterModel,
    spec: Spec,
    delta: float,
    *,
    trials: int = 1000,
    make: Make = PrivateOptimizer,
    entropy: Entropy | None = None,
) -> Audit:
    """Audit one step and sampled steps of a run on canaries, and one step through the trainer and the model.

    It reads no private data, charges no account and sends nothing; the values of the model's adapter are used as
    they are.

    Args:
        model: As the run loads it.
        spec: The run, with its noise multiplier.
        delta: Of the claim, in (0, 1).
        trials: Releases with the canary, and as many without, at least `LEAST_TRIALS`. The bound on the noise
            tightens with the square root.
        make: Makes the optimizer under audit. Test seam.
        entropy: Test seam; None is the operating system's.

    Raises:
        ConfigError: The run is not private, lacks its noise multiplier, or there are too few trials.
    """
    sigma = spec.privacy.noise_multiplier
    if not spec.privacy.enabled or sigma is None:
        raise ConfigError("only a private run with a noise multiplier can be audited; set privacy.enabled = true")
    if trials < LEAST_TRIALS:
        raise ConfigError(f"{trials} trials show nothing; use at least {LEAST_TRIALS}")
    drawn = entropy or System()
    # Three checks share what the whole audit may get wrong.
    confidence = 1 - (1 - CONFIDENCE) / 3
    shapes = [parameter.detach() for parameter in model.trainable(model.schema.roles)]
    clipping = partial(make, automatic=spec.privacy.clipping == "automatic")
    mechanism = _Mechanism(clipping, sigma, spec.privacy.clip_norm, drawn)
    checks = (
        _one_step(mechanism, shapes, trials, delta, confidence),
        _sampled_steps(mechanism, spec, trials, delta, confidence),
        _through_the_model(model, spec, drawn, delta, confidence),
    )
    return Audit(checks, delta, sigma, spec.privacy.clip_norm, model.schema.size)


@dataclass(frozen=True)
class _Mechanism:
    """What is under audit: how to make the optimizer, and what it is told."""

    make: Make
    noise_multiplier: float
    clip_norm: float
    entropy: Entropy


class _Releases:
    """The mechanism over tensors of given shapes, one release after the other, seen along the canary's direction."""

    def __init__(
        self,
        mechanism: _Mechanism,
        shapes: list[torch.Tensor],
        share: float = 1.0,
        strategy: Banded | None = None,
    ) -> None:
        """`share` is the part of the noise that is kept; `strategy` correlates it."""
        self.parameters = [nn.Parameter(torch.zeros_like(each)) for each in shapes]
        self.direction = [torch.ones_like(each) / math.sqrt(each.numel() * len(shapes)) for each in shapes]
        self.clip_norm = mechanism.clip_norm
        self.tape = Tape(self.parameters)
        self.optimizer = mechanism.make(
            torch.optim.SGD(self.parameters, lr=0.0),
            self.tape,
            mechanism.entropy,
            noise_multiplier=mechanism.noise_multiplier * share,
            clip_norm=mechanism.clip_norm,
            expected_batch=1.0,
            strategy=strategy,
        )

    def score(self, lengths: list[float]) -> float:
        """Release one step over examples whose gradients have these lengths, in units of C; so is the score."""
        if lengths:
            self.tape.begin(len(lengths))
            for parameter, unit in zip(self.parameters, self.direction, strict=True):
                scales = torch.tensor(lengths, device=unit.device).view(-1, *(1 for _ in unit.shape))
                self.tape.add(parameter, scales * self.clip_norm * unit)
            self.optimizer.accumulate()
        self.optimizer.release()
        along = 0.0
        for parameter, unit in zip(self.parameters, self.direction, strict=True):
            assert parameter.grad is not None  # release() has just set it
            along += float((parameter.grad * unit).sum())
        return along / self.clip_norm


def _one_step(mechanism: _Mechanism, shapes: list[torch.Tensor], trials: int, delta: float, confidence: float) -> Check:
    """One step over every example, at the adapter's real shapes: is each example bounded, and is the noise whole?"""
    rest = [-1.0, -1.0]

    def separation(trials: int, share: float) -> float:
        releases = _Releases(mechanism, shapes, share)
        present = np.array([releases.score([_LONG, *rest]) for _ in range(trials)])
        absent = np.array([releases.score(rest) for _ in range(trials)])
        return least_separation(present, absent, confidence)

    mu = separation(trials, 1.0)
    return Check(
        name="one step",
        trials=trials,
        steps=1,
        sampling_rate=1.0,
        claim=epsilon([Spend(1.0, mechanism.noise_multiplier, 1)], delta),
        lower=gaussian_epsilon(mu, delta),
        noise_at_most=_inverse(mu),
        control_seen=separation(LEAST_TRIALS, _CUT) > 1 / mechanism.noise_multiplier,
    )


def _sampled_steps(mechanism: _Mechanism, spec: Spec, trials: int, delta: float, confidence: float) -> Check:
    """Steps with Poisson sampling in a row: does chance hide the canary as often as was claimed?

    There is no other example, so that most steps are empty and must look like all others. The score of a trial is
    the log-likelihood ratio of its steps' scores, the best there is against the claimed mechanism. With noise bands
    the attacker knows the canary's group, and undoes what correlates the noise.
    """
    sigma, bands, steps = mechanism.noise_multiplier, spec.privacy.noise_bands, _steps(spec)
    rate, turns = participation(spec.train.sampling_rate, steps, bands)
    strategy = Banded(steps, bands, spec.train.momentum) if bands > 1 else None
    family = Family(rate, turns)

    def attack(share: float) -> tuple[float, float]:
        def scores(examples: int) -> Floats:
            """One round's; the sampler sees a data set of one example, the canary, or an empty one."""
            releases = _Releases(mechanism, [torch.zeros(_WIDTH)], share, strategy)
            samples = (poisson(mechanism.entropy, examples, rate) for _ in range(steps))
            # The canary is in the first of `bands` groups.
            lengths = ([_LONG] * (len(sample) if step % bands == 0 else 0) for step, sample in enumerate(samples))
            x = np.array([releases.score(each) for each in lengths])
            return x if strategy is None else _matched(x, strategy)

        def ratios(examples: int) -> Floats:
            x = np.stack([scores(examples) for _ in range(trials)])
            ratio = np.logaddexp(_log(1 - rate), _log(rate) + (2 * x - 1) / (2 * sigma**2))
            return np.asarray(ratio.sum(1), np.float64)

        return rates(ratios(1), ratios(0), confidence)

    noise = family.most_noise(*attack(1.0), sigma)
    return Check(
        name="sampled steps",
        trials=trials,
        steps=turns,
        sampling_rate=rate,
        claim=epsilon([Spend(rate, sigma, turns)], delta),
        lower=0.0 if math.isinf(noise) else family.epsilon(noise, delta),
        noise_at_most=noise,
        control_seen=not family.allows(sigma, *attack(_CUT)),
    )


def _matched(released: Floats, strategy: Banded) -> Floats:
    """What the releases of a round say of each step that an example of the first group may be in; shape (turns,).

    C gives the noise's independence back, and the contribution of each such step is a column of it.
    """
    dense = strategy.dense()
    columns = dense[:, :: strategy.bands]
    return np.asarray((dense @ released) @ columns / (columns**2).sum(0), np.float64)


def _steps(spec: Spec) -> int:
    """A round's steps, or of a shorter or longer one so many that the canary is probably in one, as the run allows."""
    low, high = _FEW_OR_MANY
    wanted = max(min(spec.train.steps, low), math.ceil(0.2 / spec.train.sampling_rate), spec.privacy.noise_bands)
    return min(wanted, high, spec.run.rounds * spec.train.steps)


class Silent:
    """Samples every example and adds no noise."""

    def uniform(self, count: int) -> Floats:
        """Zeros."""
        return np.zeros(count)

    def normal(self, deviation: int, count: int) -> Integers:
        """Zeros."""
        return np.zeros(count, np.int64)


_EXAMPLES = 4


def made_up_rows(spec: Spec) -> Rows:
    """Four rows that the run's task makes up; the labels go round."""
    task, layout, names = spec.model.built(), Layout(spec.model.task), spec.model.labels
    records = (identified(layout.read(task.sample(each), f"example {each + 1}")) for each in range(_EXAMPLES))
    return assembled(records, names, spec.model.task, "made-up data", Form())


def _through_the_model(model: AdapterModel, spec: Spec, entropy: Entropy, delta: float, confidence: float) -> Check:
    """One step of the real trainer on made-up texts, the last of which is the canary.

    Its direction and length are those of its gradient, which is at most C long after clipping, so that this check is
    weaker than the others; it is there to see what lies before the mechanism: loss, backward pass, batching.
    """
    assert spec.privacy.noise_multiplier is not None  # audit() has checked
    everyone = made_up_rows(spec)
    others = everyone.take(np.arange(_EXAMPLES - 1))
    canary = noisy_sum(model, everyone, spec, Silent()) - noisy_sum(model, others, spec, Silent())
    length = float(np.linalg.norm(canary))
    unit = canary / max(length, 1e-12)

    def scores(rows: Rows) -> Floats:
        return np.array([noisy_sum(model, rows, spec, entropy) @ unit for _ in range(_MODEL_TRIALS)])

    # Without noise the contribution itself is seen; it may not be longer than C. 1e-3 is for float32 and for
    # padding, which moves a text's gradient by rounding when its batch changes.
    sigma, overlong = spec.privacy.noise_multiplier, length > spec.privacy.clip_norm * (1 + 1e-3)
    mu = math.inf if overlong else least_separation(scores(everyone), scores(others), confidence)
    return Check(
        name="whole trainer",
        trials=_MODEL_TRIALS,
        steps=1,
        sampling_rate=1.0,
        claim=epsilon([Spend(1.0, sigma, 1)], delta),
        lower=gaussian_epsilon(mu, delta),
        noise_at_most=_inverse(mu),
        control_seen=length > 1e-3 * spec.privacy.clip_norm,
    )


def noisy_sum(
    model: AdapterModel, rows: Rows, spec: Spec, entropy: Entropy, start: Tensors | None = None, rate: float = 1.0
) -> Floats:
    """What one step of a round over all `rows` adds up to, shape (P,): the negative of the delta over the rate.

    Args:
        model: Left as it was.
        rows: Made-up examples.
        spec: The run.
        entropy: Of the step.
        start: The broadcast; None is the adapter as it is.
        rate: Learning rate, for a start beside which a smaller change would be rounded off.

    Raises:
        PolicyError: A client refuses to train from this start.
    """
    roles = model.schema.roles
    fresh = spec.privacy.model_copy(update={"noise_bands": 1})
    one = {"steps": 1, "sampling_rate": 1.0, "learning_rate": rate, "head_learning_rate": None, "optimizer": "sgd"}
    still = {"schedule": "constant", "warmup": 0, "ema": 0.0, "momentum": 0.0, "proximal_mu": 0.0, "microbatch": 2}
    # Without the options of the run's optimiser, which SGD has not.
    train = spec.train.model_dump(include=set(TrainSection.model_fields)) | one | still
    step = spec.model_copy(update={"train": TrainSection.model_validate(train), "privacy": fresh})
    before = model.read(model.schema)
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder), "sha256:" + "0" * 64) as ledger:
        policy = Policy.model_validate(
            {
                "client": {"name": "audit", "state": folder},
                "data": {"source": "made-up", "declared_examples": 1},
                "privacy": {"epsilon": 1e4, "delta": spec.privacy.delta},
                "limits": {"max_learning_rate": 1e4},
            }
        )
        trainer = Trainer(model, rows, step, policy, ledger, entropy_for=lambda _: entropy)
        order = Assignment(0, roles, roles, broadcast_digest="", broadcast_bytes=0)
        try:
            delta = trainer.train(spec.run.name, order, before if start is None else start).delta
        finally:
            model.load(before)
    return -np.concatenate([delta[each.name].reshape(-1) for each in model.schema.tensors]).astype(np.float64) / rate


def _inverse(mu: float) -> float:
    return math.inf if mu == 0.0 else 1 / mu


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf
