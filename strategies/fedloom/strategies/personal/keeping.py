"""An average of what clients share, beside what they train and keep."""

from dataclasses import dataclass, replace

from fedloom.strategies.api import Plan, State
from fedloom.strategies.transforms.average import Average

__all__ = ["Keeping"]


@dataclass(frozen=True)
class Keeping(Average):
    """An average of some tensors, beside which clients train one role that they keep."""

    kept: str

    def plan(self, state: State, round: int, client: str) -> Plan:
        """What is averaged and what is kept, both trained."""
        plan = super().plan(state, round, client)
        return replace(plan, train=plan.train | {self.kept}, personal=frozenset({self.kept}))
