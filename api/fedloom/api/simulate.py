"""A run on this machine, with data from files or from memory."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedloom.api.callbacks import Together
from fedloom.api.result import Result
from fedloom.api.run import Run
from fedloom.core import registry
from fedloom.core.config.file_format import Form
from fedloom.core.errors import ConfigError, DataError
from fedloom.simulation.callbacks import SoFar

if TYPE_CHECKING:
    from fedloom.client.data.packaged.api import Split
    from fedloom.client.data.rows import Rows
    from fedloom.simulation.federation import Given

__all__ = ["simulate"]

_HELD_OUT = 0.1
"""Share of each client's rows that a run is scored on if no other rows are given for it."""


def simulate(
    run: Run,
    data: Mapping[str, Any] | None = None,
    *,
    test: Any = None,
    form: Form | None = None,
    callbacks: Iterable[Callable[[SoFar], object]] = (),
    out: str | Path = "runs",
    progress: bool = True,
) -> Result:
    """Run a federation on this machine, with the clients' real trainers, ledgers and policies.

    The clients' ledgers lie in the run folder and are empty at first: the epsilon reported is that of this run alone.
    Scores on the held-out rows are exact and have no noise: they are for whoever may see these rows.

    Args:
        run: What to do.
        data: Rows by client: dicts by column, a pandas DataFrame, a pyarrow Table, one split of Hugging Face's
            `datasets`, or the path of a file or folder. None takes what the run's [data] section names.
        test: Rows to score the adapter on, as above. None holds out a tenth of each client's rows, chosen by their
            content, which then nobody trains on.
        form: How the data are to be read: names of columns, whether labels are names or positions.
        callbacks: Called after each round, in this order; those of `Callback` also before the first and when there is a
            result. One that raises `StopRun` after a round ends the run with what is committed, when all have been
            called; any other exception stops it at once, and leaves no result.
        out: Parent of the run folder.
        progress: Whether to show a bar.

    Returns:
        The adapter, metrics and what each client has spent.

    Raises:
        ConfigError: The run cannot work, or has a component that it needs installed.
        DataError: Rows are missing or malformed; the message has the client and the number of the row, from 1.
        FedloomError: Anything else that stops the run; nothing is left that looks like a finished run.
    """
    config, own = run.config, run.local_strategy
    if config.engine.kind != "inprocess" and (why := run.not_installed()) is not None:
        raise ConfigError(f'engine.kind = "{config.engine.kind}" needs what is installed, and {why}')
    if data is None and (test is not None or form is not None):
        raise ConfigError("test and form are for data that are given; name them in the run's [data] section instead")
    # Loads torch, which takes seconds: a mistake above should not have to wait for it.
    from fedloom.simulation.progress_bar import progress_bar
    from fedloom.simulation.simulate import Watcher
    from fedloom.simulation.simulate import simulate as run_simulation

    together = Together(tuple(callbacks))
    console = Console()
    seen = console.is_terminal or console.is_jupyter
    with registry.locally(run.local), progress_bar(console, disable=not (progress and seen)) as moved:
        given = None
        if data is not None:
            given = _given(run, data, test, form or Form())
            config = config.model_copy(update={"data": None})
        watcher = Watcher(moved=moved, before_rounds=together.on_run_begin, after_round=together)
        result = Result(run, run_simulation(config, Path(out), watcher, given=given, own=own))
    together.on_run_end(result)
    return result


def _given(run: Run, data: Mapping[str, Any], test: Any, form: Form) -> "Given":
    """Every client's rows, and those to score on."""
    from fedloom.client.data.rows import pooled
    from fedloom.client.policy import ClientSection
    from fedloom.client.training.local_eval import split
    from fedloom.simulation.federation import Given

    if not isinstance(data, Mapping):
        raise ConfigError(f'data is a {type(data).__name__}; give rows by client, such as {{"clinic-a": rows}}')
    for name in data:
        ClientSection(name=name)  # refuses a name that no site may have
    clients = {name: _rows(run, values, name, form, "train") for name, values in data.items()}
    if test is not None:
        return Given(clients, _rows(run, test, "test", form, "test"))
    parts = {name: split(rows, _HELD_OUT) for name, rows in clients.items()}
    if empty := [name for name, (train, _) in parts.items() if not len(train)]:
        raise DataError(f"{empty[0]} has too few rows to hold some out for scores; give more, or give `test`")
    held_out = pooled([held for _, held in parts.values()])
    if not len(held_out):
        raise DataError(f"{len(clients)} clients have too few rows to hold some out for scores; give `test`")
    return Given({name: train for name, (train, _) in parts.items()}, held_out)


def _rows(run: Run, values: Any, name: str, form: Form, part: "Split") -> "Rows":
    from fedloom.client.data.load import load_rows
    from fedloom.simulation.in_memory import rows_of

    section = run.config.model
    if not isinstance(values, str | Path):
        return rows_of(values, name, section, form)
    # One file is all of the part that it is given for; a folder or a packaged data set has both.
    part = "train" if Path(values).is_file() else part
    return load_rows(str(values), section.labels, part, section.task, form)
