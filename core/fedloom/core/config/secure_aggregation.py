"""[secure_aggregation]: sums of updates that nobody sees alone."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedloom.core.config.parsing import Section
from fedloom.core.secagg.fixed_point import FixedPoint
from fedloom.core.secagg.lattice import Lattice

__all__ = ["SecureAggregationSection"]


class SecureAggregationSection(Section):
    """[secure_aggregation]: the coordinator sees only the sum of a round's updates."""

    enabled: bool = False
    """True masks every update among the cohort's clients; needs a linear strategy, uniform weights and peers that have
    pinned each other's keys."""
    threshold: float = Field(default=2 / 3, gt=0.5, le=1)
    """Share of a cohort that must last to the end of a sum; so many clients together could unmask an update."""
    max_change: float = Field(default=4.0, ge=1e-6, le=1e6)
    """Largest absolute change of one value in one round. Values are rounded to steps of about max_change times
    max_clients / 2³¹."""
    max_clients: int = Field(default=256, ge=3, le=1000)
    """Most clients in one sum."""
    bits: Literal[8, 16, 32] = 32
    """Bits of a masked value. Below 32, updates are turned by a random rotation before they are rounded."""
    max_norm: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Below 32 bits: L2 norm of the longest update; a longer one is scaled down to it. Twice what is usual is a good
    choice: the error of rounding grows with it."""
    step_deadline_s: float = Field(default=60.0, gt=0, le=1e8)
    """Seconds after which a step of the sum goes on without those who are missing."""

    @model_validator(mode="after")
    def _check(self) -> "SecureAggregationSection":
        if (self.bits < 32) is not (self.max_norm is not None):
            raise ValueError(
                f"secure_aggregation.bits = {self.bits} with max_norm = {self.max_norm}; fewer than 32 bits take a "
                "max_norm, and 32 take none"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in [model]: builds that know 32 bits alone have stored no number of them."""
        found: dict[str, Any] = plain(self)
        if self.max_norm is None:
            found.pop("bits", None)
            found.pop("max_norm", None)
        return found

    @property
    def integers(self) -> FixedPoint | Lattice:
        """The integers that updates are rounded to."""
        if self.max_norm is None:
            return FixedPoint(self.max_change, self.max_clients)
        return Lattice(self.bits, self.max_norm, self.max_clients)
