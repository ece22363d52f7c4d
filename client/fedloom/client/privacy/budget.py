"""What a run costs this site's data, and how much of it the budget still buys."""

from dataclasses import dataclass

from fedloom.client.config import PrivacyPolicy
from fedloom.client.privacy.ledger import Ledger
from fedloom.proto import accounting
from fedloom.proto.accounting import Spend
from fedloom.proto.errors import BudgetError, PolicyError
from fedloom.proto.run import Spec

__all__ = ["Outlook", "check_affordable", "outlook", "round_spend", "rounds_left"]


@dataclass(frozen=True)
class Outlook:
    """The standing of a data set before a run.

    Args:
        run: The run's name.
        spent: Epsilon spent so far.
        budget: Epsilon allowed over the life of the data set.
        delta: Delta of both.
        rounds: Rounds of the run.
        affordable: How many of them the budget still buys.
    """

    run: str
    spent: float
    budget: float
    delta: float
    rounds: int
    affordable: int

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"epsilon {self.spent:.4f} of {self.budget:g} is spent at delta {self.delta:g} over the life of this data; "
            f"the rest buys {self.affordable} of the {self.rounds} rounds of run {self.run!r}"
        )


def round_spend(spec: Spec) -> Spend:
    """What one round of a private run costs.

    Raises:
        PolicyError: The run has no noise multiplier.
    """
    if spec.privacy.noise_multiplier is None:
        raise PolicyError("a private run needs a noise multiplier")
    return Spend(spec.train.sampling_rate, spec.privacy.noise_multiplier, spec.train.steps)


def rounds_left(ledger: Ledger, spend: Spend, policy: PrivacyPolicy, most: int) -> int:
    """How many more rounds of `spend` the budget buys, 0 to `most`."""
    before = (charge.spend for charge in ledger.charges())
    return accounting.rounds_left(before, spend, policy.epsilon, policy.delta, most=most)


def outlook(ledger: Ledger, spec: Spec, policy: PrivacyPolicy) -> Outlook:
    """The standing of the data before the run `spec`."""
    left = rounds_left(ledger, round_spend(spec), policy, spec.run.rounds)
    return Outlook(spec.run.name, ledger.epsilon(policy.delta), policy.epsilon, policy.delta, spec.run.rounds, left)


def check_affordable(standing: Outlook) -> None:
    """Refuse a run of which not even one round can be paid.

    Raises:
        BudgetError: It is such a run.
    """
    if standing.affordable == 0:
        raise BudgetError(
            f"{standing}: not even one. Ask for a run with more noise, a lower sampling rate or fewer steps, or raise "
            "privacy.epsilon in the policy if you may"
        )
