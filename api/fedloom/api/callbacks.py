"""Callbacks that come with fedloom. Any function that takes `SoFar` is one."""

from dataclasses import dataclass

from fedloom.core.errors import ConfigError
from fedloom.simulation.callbacks import SoFar

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Keep the adapter of every so many rounds, in the run folder's checkpoints/round-N.

    Args:
        every: Number of rounds, at least 1.

    Raises:
        ConfigError: `every` is below 1.
    """

    every: int = 1

    def __post_init__(self) -> None:
        """Refuse a round that never comes."""
        if self.every < 1:
            raise ConfigError(f"Checkpoint every is {self.every}; set a number of rounds from 1 up")

    def __call__(self, so_far: SoFar) -> None:
        """Save the adapter if this round's is to be kept."""
        if so_far.round % self.every == 0:
            so_far.save_adapter(so_far.folder / "checkpoints" / f"round-{so_far.round}")
