"""Callbacks that come with fedloom. Any function that takes `SoFar` is one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedloom.core.errors import ConfigError
from fedloom.simulation.callbacks import SoFar, StopRun

if TYPE_CHECKING:
    from fedloom.api.result import Result

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "Together"]

_GREATER_IS_BETTER = {"accuracy": True, "loss": False, "federated_accuracy": True, "federated_loss": False}


class Callback:
    """Hears of more moments than a function does. Each method does nothing unless it is overridden."""

    def on_run_begin(self, so_far: SoFar) -> None:
        """Before the first round: `so_far` has the score of the starting adapter. Any exception here stops the run."""

    def on_round_end(self, so_far: SoFar) -> None:
        """After each round, and before the next one begins. May raise `StopRun`."""

    def on_run_end(self, result: "Result") -> None:
        """When the result is written, also after `StopRun`; not if the run failed."""

    def __call__(self, so_far: SoFar) -> None:
        """After each round, as a function is called."""
        self.on_round_end(so_far)


@dataclass(frozen=True)
class Together(Callback):
    """Several callbacks as one. All hear of a round, also of that after which one of them ends the run."""

    each: tuple[Callable[[SoFar], object], ...]

    def on_run_begin(self, so_far: SoFar) -> None:
        """Functions hear of rounds alone."""
        for callback in self.each:
            if isinstance(callback, Callback):
                callback.on_run_begin(so_far)

    def on_round_end(self, so_far: SoFar) -> None:
        """Call them in their order."""
        stop: StopRun | None = None
        for callback in self.each:
            try:
                callback(so_far)
            except StopRun as raised:
                stop = raised
        if stop is not None:
            raise stop

    def on_run_end(self, result: "Result") -> None:
        """Functions hear of rounds alone."""
        for callback in self.each:
            if isinstance(callback, Callback):
                callback.on_run_end(result)


@dataclass(frozen=True)
class Checkpoint(Callback):
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

    def on_round_end(self, so_far: SoFar) -> None:
        """Save the adapter if this round's is to be kept."""
        if so_far.round % self.every == 0:
            so_far.save_adapter(so_far.folder / "checkpoints" / f"round-{so_far.round}")


@dataclass
class EarlyStopping(Callback):
    """End the run when a figure has not become better for some of the rounds that have it.

    When a run stops is told by its number of rounds. Held-out figures are exact: stop by those of rows that need no
    protection, or by `federated_loss` and `federated_accuracy`, which the clients noise and charge.

    Args:
        metric: A name of `SoFar.figures`.
        patience: Rounds in a row without a better figure, at least 1; rounds that are not evaluated do not count.
        threshold: By how much a figure must be better, in its own unit, from 0.
        greater_is_better: None where the metric is an accuracy or a loss.

    Raises:
        ConfigError: A value is out of its range, or nothing says which direction is better.
    """

    metric: str = "loss"
    patience: int = 3
    threshold: float = 0.0
    greater_is_better: bool | None = None
    best: float | None = field(default=None, init=False)
    """The best figure so far."""
    best_round: int | None = field(default=None, init=False)
    """The round that has it."""
    _waited: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what could never stop a run, or always would."""
        if self.patience < 1:
            raise ConfigError(f"EarlyStopping patience is {self.patience}; set a number of rounds from 1 up")
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"EarlyStopping threshold is {self.threshold}; set a finite number from 0 up")
        if self.greater_is_better is None and self.metric not in _GREATER_IS_BETTER:
            raise ConfigError(f"EarlyStopping cannot tell which {self.metric} is better; set greater_is_better")

    def on_run_begin(self, so_far: SoFar) -> None:
        """Forget an earlier run."""
        self.best, self.best_round, self._waited = None, None, 0

    def on_round_end(self, so_far: SoFar) -> None:
        """Stop if there was nothing better for `patience` rounds.

        Raises:
            ConfigError: The run has no such metric.
        """
        found = so_far.figures
        if self.metric not in found:
            if so_far.accuracy is not None and not self.metric.startswith("federated_"):
                raise ConfigError(f"EarlyStopping knows no {self.metric!r}; a round has {', '.join(sorted(found))}")
            return
        value = found[self.metric]
        if self._better(value):
            self.best, self.best_round, self._waited = value, so_far.round, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            raise StopRun

    def _better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        greater = _GREATER_IS_BETTER.get(self.metric) if self.greater_is_better is None else self.greater_is_better
        return (value - self.best if greater else self.best - value) > self.threshold
