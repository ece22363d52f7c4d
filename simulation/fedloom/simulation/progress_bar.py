"""A bar that follows a simulation, in a terminal or a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedloom.server.monitoring.progress import Progress as RunProgress

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(console: Console, *, disable: bool = False) -> Iterator[Callable[[RunProgress], None]]:
    """Show a bar until the block ends.

    Args:
        console: Where. One made in a notebook knows that it is there.
        disable: Show nothing.

    Yields:
        What takes the run's progress, as `Watcher.moved` does.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # By the pace of the last ten minutes: rich's own half a minute is shorter than many a round.
    left = (TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *left, console=console, transient=True, speed_estimate_period=600, disable=disable) as bar:
        task = bar.add_task("loading model and data", total=None)

        def moved(run: RunProgress) -> None:
            size = max(1, len(run.cohort) or len(run.live))
            done = run.round * size + len(run.submitted)
            label = f"round {min(run.round + 1, run.rounds)}/{run.rounds}"
            bar.update(task, description=label, total=run.rounds * size, completed=done)

        yield moved
