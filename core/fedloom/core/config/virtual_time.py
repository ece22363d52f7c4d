"""[virtual_time] of a run file: how long simulated clients take, when they are there, and how often they drop out."""

from typing import Self

from pydantic import Field, model_validator

from fedloom.core.config.parsing import FileName, Section

__all__ = ["VirtualTimeSection"]


class VirtualTimeSection(Section):
    """[virtual_time]: where it is given, a simulation has a clock of its own, on which work takes the time given here.

    Nobody waits for it: a day of a federation passes as fast as its training can be computed. Deadlines, leases and
    buffers of [rounds] go by it. Clients are told nothing of this section.
    """

    step_s: float = Field(default=0.0, ge=0, le=1e6)
    """Seconds that one optimiser step takes the median client."""
    step_spread: float = Field(default=0.0, ge=0, le=5)
    """How unlike clients are in that: the standard deviation of the logarithm. With 0.5 the slowest of 20 takes about
    2.5 times the median, with 1 about 6 times."""
    download_mbps: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Megabits a second at which the median client downloads what it trains from. None takes no time."""
    upload_mbps: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Likewise for the updates that it sends."""
    network_spread: float = Field(default=0.0, ge=0, le=5)
    """As step_spread, for a client's line: one factor for both directions."""
    mean_on_s: float | None = Field(default=None, gt=0, le=1e9)
    """Mean seconds for which a client is there; the lengths are exponential. None: it always is. Work that it has not
    sent when it goes is lost."""
    mean_off_s: float | None = Field(default=None, gt=0, le=1e9)
    """Mean seconds until it is back, likewise."""
    dropout_rate: float = Field(default=0.0, ge=0, le=0.9)
    """Probability that a client falls silent in an assignment that it has begun, and comes back without its work when
    that would have been done. What over-selection counts on is rounds.dropout_rate."""
    trace: FileName | None = None
    """A CSV file with the columns client, start_s, end_s and, if speeds were measured, step_s: when each client is
    there, in place of mean_on_s and mean_off_s, and of step_s and step_spread. An empty end_s is for ever."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all that is drawn here, for each client by its name, whatever order they work in."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.mean_on_s is None) != (self.mean_off_s is None):
            raise ValueError("mean_on_s and mean_off_s go together; give both or leave out both")
        if self.trace is not None and self.mean_on_s is not None:
            raise ValueError("trace and mean_on_s both say when clients are there; leave one of them out")
        return self
