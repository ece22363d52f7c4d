"""The half of a trainer that answers for the data: what a round may ask, what it is charged, and what stays here.

Its steps may be done elsewhere. The checks, the ledger and the personal tensors are where the data's owner is.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fedloom.client.policy import Policy
from fedloom.client.session.assignment_checks import check_broadcast, check_order
from fedloom.client.session.personal_tensors import Personal
from fedloom.core.config.run import Spec, TrainSection
from fedloom.core.errors import PolicyError, ProtocolError
from fedloom.core.privacy.accounting import Spend
from fedloom.core.privacy.spends import evaluation_spend, training_spend
from fedloom.core.schema import Array, Schema, Tensors
from fedloom.proto.messages import Assignment, upload_schema

__all__ = ["Account", "Admission", "Admitted", "AdmittedResult"]

log = logging.getLogger(__name__)


class Account(Protocol):
    """What training needs of a ledger; see `Ledger`, whose methods these are."""

    def evaluated(self, run: str, round: int) -> bool:
        """Whether an evaluation was charged for this round."""

    def reserve(
        self,
        run: str,
        round: int,
        spend: Spend,
        *,
        budget: float,
        delta: float,
        evaluation: Spend | None = None,
        noise_bands: int = 1,
    ) -> int:
        """Charge a round before its work starts."""

    def reserve_result(self, run: str, rounds: int, spend: Spend, *, budget: float, delta: float) -> int:
        """Charge the scoring of the model that a run ended with."""

    def release(self, number: int, digest: str) -> None:
        """Note what leaves for a charge."""

    def drop(self, why: str | None) -> bool:
        """Give up the charge that was made last, if nothing was released for it."""


@dataclass(frozen=True)
class Admitted:
    """A round that may be trained, and is paid for."""

    train: TrainSection
    """How to train."""
    upload: Schema
    """What the update holds."""
    evaluating: bool
    """Whether it carries figures on held-out rows."""
    charge: int | None
    """Number of the ledger's charge; None without privacy."""


@dataclass(frozen=True)
class AdmittedResult:
    """The model that a run ended with, which may be scored; that is paid for."""

    charge: int | None
    """Number of the ledger's charge; None without privacy."""


class Admission:
    """What a site decides about a round before anything is trained, and notes about it afterwards.

    Args:
        schema: The adapter's schema as the base model here gives it.
        spec: The run, already checked against `policy`.
        policy: The site's policy.
        ledger: The data set's account; a private run needs it.
        personal: Folder of what is trained and kept here. None keeps it in memory only.

    Raises:
        PolicyError: The run is private and there is no ledger or no declared size.
    """

    def __init__(
        self, schema: Schema, spec: Spec, policy: Policy, ledger: Account | None, *, personal: Path | None = None
    ) -> None:
        if spec.privacy.enabled and (ledger is None or policy.data.declared_examples is None):
            raise PolicyError("a private run needs a ledger and data.declared_examples in the policy")
        self._schema, self.spec, self.policy, self.ledger = schema, spec, policy, ledger
        self._personal = Personal(personal, policy.client.name, schema)

    @property
    def schema(self) -> Schema:
        """The adapter's schema as the base model here gives it."""
        return self._schema

    def admit(self, run: str, assignment: Assignment, broadcast: Tensors) -> Admitted:
        """Check a round, and charge it; durable on return.

        Raises:
            PolicyError: The assignment or the broadcast is beyond the run or the policy, or asks for what was personal
                before. Nothing was charged.
            ProtocolError: It trains nothing this adapter has, or something without a broadcast value.
            BudgetError: The privacy budget does not cover the round; nothing was charged.
        """
        train = check_order(self.policy, self.spec, self.schema, assignment)
        check_broadcast(self.policy, self.schema, broadcast)
        self._personal.check(run, assignment)
        upload = self._upload(assignment, broadcast)
        evaluating = self._evaluates(run, assignment.round)
        return Admitted(train, upload, evaluating, self._reserve(run, assignment.round, evaluating))

    def admit_result(self, run: str, rounds: int, result: Tensors) -> AdmittedResult | None:
        """Check the model that a run ended with after so many rounds, and charge the scoring of it; durable on return.

        Returns:
            None where the run does not ask for that, or the policy or the ledger does not allow it.
        """
        if not self.spec.federated_evaluation.enabled or not 0 < rounds <= self.spec.run.rounds:
            return None
        try:
            check_broadcast(self.policy, self.schema, result)
            if self.ledger is None or not self.spec.privacy.enabled:
                return AdmittedResult(None)
            mine, spend = self.policy.privacy, evaluation_spend(self.spec)
            return AdmittedResult(self.ledger.reserve_result(run, rounds, spend, budget=mine.epsilon, delta=mine.delta))
        except PolicyError as error:
            log.warning("the result is not scored here: %s", error)
            return None

    def personal(self, run: str) -> dict[str, Array]:
        """What was trained and kept here in this run, float32, by the schema's names; empty if nothing was.

        Raises:
            LedgerError: It is damaged.
        """
        return self._personal.of(run)

    def keep_personal(self, run: str, values: Tensors) -> None:
        """Put personal tensors in the place of those of the same names; durable on return.

        Raises:
            LedgerError: The disk refuses.
        """
        self._personal.keep(run, values)

    def release(self, charge: int | None, digest: str) -> None:
        """Note in the ledger what is about to leave for a charge; durable on return.

        Raises:
            PolicyError: It was charged, but there is no ledger here to note it in.
        """
        if charge is None:
            return
        if self.ledger is None:
            raise PolicyError(
                f"charge {charge} was made in a ledger that this run does not use; nothing is sent for it"
            )
        self.ledger.release(charge, digest)

    def release_figures(self, charge: int | None, figures: tuple[float, ...]) -> None:
        """The same for figures on the result of a run."""
        self.release(charge, hashlib.sha256(np.array(figures).tobytes()).hexdigest())

    def drop(self, why: str | None) -> bool:
        """Give up the work that was begun last, if it was charged and not released; see `Training.drop`."""
        return self.ledger is not None and self.ledger.drop(why)

    def _upload(self, assignment: Assignment, broadcast: Tensors) -> Schema:
        """The schema of the round's delta, once it is sure that the round can be trained."""
        schema = upload_schema(self.schema, assignment)
        missing = [spec.name for spec in schema.tensors if spec.name not in broadcast]
        if missing:
            raise ProtocolError(f"{len(missing)} tensors to train are not in the broadcast, such as {missing[0]!r}")
        return schema

    def _evaluates(self, run: str, round: int) -> bool:
        """Whether this round's update carries figures. If it is trained anew it does not: they were charged once."""
        if not self.spec.federated_evaluation.due(round):
            return False
        return self.ledger is None or not self.ledger.evaluated(run, round)

    def _reserve(self, run: str, round: int, evaluating: bool) -> int | None:
        if not self.spec.privacy.enabled:
            return None
        assert self.ledger is not None  # checked at construction
        mine, bands = self.policy.privacy, self.spec.privacy.noise_bands
        return self.ledger.reserve(
            run,
            round,
            training_spend(self.spec),
            budget=mine.epsilon,
            delta=mine.delta,
            evaluation=evaluation_spend(self.spec) if evaluating else None,
            noise_bands=bands,
        )
