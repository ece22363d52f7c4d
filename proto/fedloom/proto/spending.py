"""What a run costs one client's data: the training of each round, and the evaluations among them."""

import math

from fedloom.proto.accounting import REPORT_GRID, Spend, Statement, statement
from fedloom.proto.errors import PolicyError
from fedloom.proto.run import Spec

__all__ = ["evaluation_spend", "evaluations", "run_spends", "run_statement", "training_spend"]


def training_spend(spec: Spec) -> Spend:
    """What one round's training costs.

    Raises:
        PolicyError: The run has no noise multiplier.
    """
    if spec.privacy.noise_multiplier is None:
        raise PolicyError("a private run needs a noise multiplier")
    return Spend(spec.train.sampling_rate, spec.privacy.noise_multiplier, spec.train.steps)


def evaluation_spend(spec: Spec) -> Spend:
    """What one evaluation by a client costs: the Gaussian mechanism on all its held-out rows, once."""
    return Spend(1.0, spec.federated_evaluation.noise_multiplier, 1)


def evaluations(spec: Spec, rounds: int) -> int:
    """In how many of so many rounds a client evaluates at most, whichever rounds they are."""
    section = spec.federated_evaluation
    return min(rounds, math.ceil(spec.run.rounds / section.every)) if section.enabled else 0


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
