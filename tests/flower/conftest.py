"""A site with a real ledger and outbox, whose training is random numbers that are never the same twice."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import Policy
from fedloom.client.privacy.ledger.ledger import Ledger
from fedloom.client.session.api import CheckCancelled, Trained
from fedloom.core.codecs import codec
from fedloom.core.config.run import Spec
from fedloom.core.privacy.accounting import Spend
from fedloom.core.schema import Role, Schema, Tensors, TensorSpec
from fedloom.flower.messages import Request
from fedloom.flower.resident_trainer import Resident
from fedloom.proto.messages import Assignment, Joined

SCHEMA = Schema((TensorSpec("m.A", "m", Role.LORA_A, (1, 8)), TensorSpec("m.B", "m", Role.LORA_B, (8, 1))))
BROADCAST = codec("fp32").encode(SCHEMA, SCHEMA.zeros())
ROLES = frozenset({Role.LORA_A, Role.LORA_B})


@dataclass
class Dice:
    """A trainer that charges a real ledger and answers with the operating system's own numbers."""

    ledger: Ledger
    calls: list[str] = field(default_factory=list)
    schema: Schema = SCHEMA
    declared_examples: int = 40
    failure: BaseException | None = None

    def train(self, run: str, assignment: Assignment, broadcast: Tensors, check_cancelled: CheckCancelled) -> Trained:
        self.calls.append(f"train {assignment.round}")
        if self.failure is not None:
            raise self.failure
        charge = self.ledger.reserve(run, assignment.round, Spend(0.1, 2.0, 1), budget=50.0, delta=1e-5)
        delta = {
            each.name: np.frombuffer(os.urandom(8), np.uint8).astype(np.float32).reshape(each.shape)
            for each in SCHEMA.tensors
        }
        return Trained(delta, charge)

    def release(self, charge: int | None, digest: str) -> None:
        self.calls.append("release")
        assert charge is not None
        self.ledger.release(charge, digest)

    def drop(self, why: str | None) -> bool:
        return self.ledger.drop(why)


@dataclass
class Site:
    """What is on one machine, and a resident trainer there that can be started again."""

    policy: Policy
    trainers: list[Dice] = field(default_factory=list)
    failure: BaseException | None = None

    def start(self) -> Resident:
        return Resident(self.policy, self._prepare, self.policy.client.state / "spool")

    def _prepare(self, joined: Joined) -> Dice:
        dice = Dice(Ledger(self.policy.client.state / "ledger", "sha256:" + "0" * 64), failure=self.failure)
        self.trainers.append(dice)
        return dice

    @property
    def charges(self) -> int:
        with Ledger(self.policy.client.state / "ledger", "sha256:" + "0" * 64) as ledger:
            return len(ledger.charges())

    @property
    def waiting(self) -> list[Path]:
        return sorted((self.policy.client.state / "spool").glob("*"))


@pytest.fixture
def site(policy: Policy) -> Site:
    return Site(policy)


@pytest.fixture
def joined(spec: Spec) -> Joined:
    return Joined("run-1", 1, spec, SCHEMA)


@pytest.fixture
def work(joined: Joined) -> Callable[[int], Request]:
    """Asks for a round."""

    def ask(round: int) -> Request:
        digest = hashlib.sha256(BROADCAST).hexdigest()
        return Request(joined, Assignment(round, ROLES, ROLES, digest, len(BROADCAST)))

    return ask
