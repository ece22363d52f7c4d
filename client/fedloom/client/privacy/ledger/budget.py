"""What a run costs this site's data, and how much of it the budget still buys."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from fedloom.client.policy import PrivacyPolicy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.core.config.run import Spec
from fedloom.core.errors import BudgetError
from fedloom.core.privacy import accounting
from fedloom.core.privacy.accounting import Spend
from fedloom.core.privacy.spends import evaluation_spend, run_spends, training_spend

__all__ = ["Outlook", "affordable", "check_affordable", "outlook", "rounds_left"]


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
        done: How many of them are behind this client, as its ledger knows.
    """

    run: str
    spent: float
    budget: float
    delta: float
    rounds: int
    affordable: int
    done: int = 0

    @property
    def short(self) -> int:
        """How many of the rounds that are left cannot be paid."""
        return max(0, self.rounds - self.done - self.affordable)

    def __str__(self) -> str:
        """One line for people."""
        left = f"{self.rounds - self.done} rounds that are left" if self.done else f"{self.rounds} rounds"
        return (
            f"epsilon {self.spent:.4f} of {self.budget:g} is spent at delta {self.delta:g} over the life of this data; "
            f"the rest buys {self.affordable} of the {left} of run {self.run!r}"
        )

    @property
    def warning(self) -> str | None:
        """What to know if the budget does not last to the end of the run; None if it does."""
        if not self.short:
            return None
        return (
            f"{self.short} of the rounds that are left cannot be paid, so this client leaves before the end; a round "
            "that was begun and lost is paid for twice. Raise privacy.epsilon in the policy if you may, or ask for a "
            "run with more noise: rounds.spare_rounds leaves room for rounds that are done again"
        )


def rounds_left(ledger: Ledger, spend: Spend, policy: PrivacyPolicy, most: int) -> int:
    """How many more rounds of `spend` the budget buys, 0 to `most`."""
    return accounting.rounds_left(ledger.spends(), spend, policy.epsilon, policy.delta, most=most)


def affordable(prior: Iterable[Spend], spec: Spec, policy: PrivacyPolicy) -> int:
    """How many rounds of the run `spec`, of those it has, the budget buys after `prior`.

    Raises:
        PolicyError: The run has no noise multiplier.
    """
    cost = partial(run_spends, spec)
    return accounting.most_rounds(prior, cost, policy.epsilon, policy.delta, most=spec.run.rounds)


def outlook(ledger: Ledger, spec: Spec, policy: PrivacyPolicy, run: str | None = None) -> Outlook:
    """The standing of the data before the run `spec`, or in the middle of it.

    Args:
        ledger: The data's account.
        spec: The run.
        policy: The budget.
        run: The run's name in the ledger, if this client may have taken part in it before.
    """
    rounds = spec.run.rounds
    done = max((each.round + 1 for each in ledger.charges() if each.run == run and each.digest is not None), default=0)
    # Which rounds evaluate is known, and so is which of them have; what cannot pay for the result's score goes without.
    due = [
        each
        for each in range(done, rounds)
        if spec.federated_evaluation.due(each) and not (run and ledger.evaluated(run, each))
    ]

    def cost(more: int) -> tuple[Spend, ...]:
        return (training_spend(spec),) * more + (evaluation_spend(spec),) * min(more, len(due))

    left = accounting.most_rounds(ledger.spends(), cost, policy.epsilon, policy.delta, most=rounds - done)
    return Outlook(spec.run.name, ledger.epsilon(policy.delta), policy.epsilon, policy.delta, rounds, left, done)


def check_affordable(standing: Outlook) -> None:
    """Refuse a run of which not even one round can be paid.

    Raises:
        BudgetError: It is such a run.
    """
    if standing.affordable == 0 and standing.short:
        raise BudgetError(
            f"{standing}: not even one. Ask for a run with more noise, a lower sampling rate or fewer steps, or raise "
            "privacy.epsilon in the policy if you may"
        )
