"""What a run costs one client's data: the training of each round, and the evaluations among them."""

import math

from fedloom.core.config.run import Spec
from fedloom.core.errors import PolicyError
from fedloom.core.privacy.accounting import REPORT_GRID, Spend, Statement, statement
from fedloom.core.privacy.banded import Banded, participation

__all__ = [
    "LEAST_BATCH",
    "banded",
    "evaluation_spend",
    "evaluations",
    "faint",
    "round_participation",
    "run_spends",
    "run_statement",
    "training_spend",
]

LEAST_BATCH = 5.0
"""Expected examples in a step of a private run below which a client is warned of."""


def faint(spec: Spec, declared_examples: int) -> str | None:
    """Why a site of this declared size gives more noise than news; None if it does not.

    The noise of a step is divided by the examples that it is expected to have: by 1 for a site of 5 at a rate of 0.2,
    where a site of 600 divides the same noise by 120.
    """
    expected = spec.train.sampling_rate * declared_examples
    if not spec.privacy.enabled or expected >= LEAST_BATCH:
        return None
    return (
        f"a step has {expected:.1f} of {declared_examples:,} declared examples on average, which its noise will drown; "
        f"{math.ceil(LEAST_BATCH / spec.train.sampling_rate):,} examples or more count at train.sampling_rate = "
        f"{spec.train.sampling_rate:g}. Join several small sites to one, or ask for a higher rate"
    )


def round_participation(spec: Spec) -> tuple[float, int]:
    """How one example takes part in a round's training, see `participation`: all of its cost but the noise."""
    return participation(spec.train.sampling_rate, spec.train.steps, spec.privacy.noise_bands)


def banded(spec: Spec) -> Banded | None:
    """The matrix that correlates the noise of a round; None where the noise of each step is its own."""
    if not spec.privacy.enabled or spec.privacy.noise_bands == 1:
        return None
    return Banded(spec.train.steps, spec.privacy.noise_bands, spec.train.momentum)


def training_spend(spec: Spec) -> Spend:
    """What one round's training costs: with noise bands fewer steps at a higher rate than those that are taken.

    Raises:
        PolicyError: The run has no noise multiplier.
    """
    if spec.privacy.noise_multiplier is None:
        raise PolicyError("a private run needs a noise multiplier")
    rate, steps = round_participation(spec)
    return Spend(rate, spec.privacy.noise_multiplier, steps)


def evaluation_spend(spec: Spec) -> Spend:
    """What one evaluation by a client costs: the Gaussian mechanism on all its held-out rows, once."""
    return Spend(1.0, spec.federated_evaluation.noise_multiplier, 1)


def evaluations(spec: Spec, rounds: int) -> int:
    """How often a client evaluates at most in so many rounds, whichever they are, and once at the run's end."""
    section = spec.federated_evaluation
    return min(rounds, math.ceil(spec.run.rounds / section.every)) + 1 if section.enabled else 0


def run_spends(spec: Spec, rounds: int) -> tuple[Spend, ...]:
    """What a client has spent that took part in so many rounds of a private run: never below what its ledger says.

    Training rows and held-out rows are charged as if they were the same, which costs more than either of them.
    """
    return (training_spend(spec),) * rounds + (evaluation_spend(spec),) * evaluations(spec, rounds)


def run_statement(spec: Spec, rounds: int, grid: float = REPORT_GRID) -> Statement:
    """The terms and the epsilon of `run_spends`.

    Raises:
        PolicyError: The run has no noise multiplier.
        ConfigError: There is no finite epsilon at the run's delta.
    """
    return statement(run_spends(spec, rounds), spec.privacy.delta, grid, rounds=rounds)
