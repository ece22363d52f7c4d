"""Six clients of a secure sum and somebody who carries their messages."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedloom.client.policy import SecureAggregationPolicy
from fedloom.client.secagg.identity_key import load_identity, public_text
from fedloom.client.secagg.participant import Attempt, Member
from fedloom.core.config.run import SecureAggregationSection
from fedloom.core.secagg.keys import Place
from fedloom.core.secagg.steps import ALL

NAMES = ("ann", "ben", "cat", "dan", "eve", "fay")
PLACE = Place("run", 1, 0)
SECTION = SecureAggregationSection(enabled=True)
UPDATE = np.arange(1000, dtype="<u4").tobytes()


@dataclass
class Cohort:
    """Six clients and somebody who carries their messages."""

    folder: Path
    place: Place = PLACE
    update: bytes = UPDATE
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attempts = {name: Attempt(self.member(name), self.place, self.update, "ab") for name in NAMES}

    def member(self, name: str, **policy: object) -> Member:
        """Who this client is; its policy pins everybody unless told otherwise."""
        folder = self.folder
        peers = {each: public_text(load_identity(folder / each)) for each in NAMES}
        rules = SecureAggregationPolicy.model_validate({"peers": peers, **policy})
        return Member(name, load_identity(folder / name), folder / name, rules, SECTION)

    def again(self) -> "Cohort":
        """The same clients in another attempt, or after a restart."""
        return Cohort(self.folder, self.place, self.update)

    @property
    def adverts(self) -> dict[str, bytes]:
        return {name: attempt.message.parts[ALL] for name, attempt in self.attempts.items()}

    def shared(self) -> dict[str, dict[str, bytes]]:
        adverts = self.adverts
        return {name: attempt.share(adverts) for name, attempt in self.attempts.items()}

    def masked(self) -> dict[str, bytes]:
        sealed = self.shared()
        return {
            name: attempt.mask({peer: sealed[peer][name] for peer in NAMES if peer != name})
            for name, attempt in self.attempts.items()
        }

    def confirmed(self, survivors: frozenset[str]) -> dict[str, bytes]:
        self.masked()
        return {name: self.attempts[name].confirm(survivors) for name in sorted(survivors)}


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)
