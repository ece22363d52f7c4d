"""Runs over a grid of settings and seeds, and a table of what came of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from fedloom.api.result import Result
from fedloom.api.run import Run
from fedloom.api.simulate import simulate
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas

__all__ = ["Sweep", "Trial", "sweep"]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    setting: Mapping[str, Any]
    """What was changed, by section.key."""
    seed: int
    result: Result


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, setting by setting."""

    trials: tuple[Trial, ...]

    def table(self) -> "pandas.DataFrame":
        """One row a setting, the most accurate first.

        Returns:
            The changed keys; accuracy (0 to 1) and loss (nats) on the held-out rows, their means over the seeds;
            accuracy_std, the standard deviation over the seeds (NaN for one); epsilon, the most that a client has
            spent in one of the runs; seeds, how many runs.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ConfigError("tables need pandas, which is not installed; pip install 'fedloom[notebook]'") from error
        keys = list(self.trials[0].setting)
        rows = [
            {
                **{
                    key: value if isinstance(value, int | float | str) else repr(value)
                    for key, value in trial.setting.items()
                },
                "accuracy": trial.result.score.accuracy,
                "loss": trial.result.score.loss,
                "epsilon": max(trial.result.epsilon.values(), default=float("nan")),
            }
            for trial in self.trials
        ]
        grouped = pandas.DataFrame(rows).groupby(keys, sort=False, dropna=False)
        table = grouped.agg(
            accuracy=("accuracy", "mean"),
            accuracy_std=("accuracy", "std"),
            loss=("loss", "mean"),
            epsilon=("epsilon", "max"),
            seeds=("accuracy", "size"),
        )
        return table.reset_index().sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)


def _shown(value: Any) -> Any:
    """A cell of the table: objects have no order and some no hash, so their text stands for them."""
    return value if isinstance(value, bool | int | float | str) else repr(value)


def sweep(run: Run, grid: Mapping[str, Sequence[Any]], *, seeds: int | Iterable[int] = 1, **simulation: Any) -> Sweep:
    """Simulate every combination of some settings, each with several seeds.

    Every combination is checked before the first run begins. On private data a search costs budget: the epsilon of
    whoever picks the best of k runs is that of all k together.

    Args:
        run: What stays the same.
        grid: Values to try, by section.key: {"train.learning_rate": [1, 4, 16]}. task, adapter and strategy take
            objects.
        seeds: Seeds, or their number, counted from the run's own.
        **simulation: Arguments of `simulate`, such as data, test and out.

    Raises:
        ConfigError: A key is unknown, a value wrong, or there is nothing to try.
    """
    chosen = range(run.config.run.seed, run.config.run.seed + seeds) if isinstance(seeds, int) else tuple(seeds)
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"{key} is {values!r}; give a list of values to try, such as [{values!r}]")
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if not (grid and settings and chosen):
        raise ConfigError("there is nothing to try; give at least one key, one value of each and one seed")
    name = run.config.run.name
    planned = [
        (setting, seed, run.replace({**setting, "run.seed": seed, "run.name": f"{name}-{number}-seed-{seed}"}))
        for number, setting in enumerate(settings, 1)
        for seed in chosen
    ]
    return Sweep(tuple(Trial(setting, seed, simulate(each, **simulation)) for setting, seed, each in planned))
