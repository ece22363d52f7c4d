"""The rows by which `fedloom merge --method atlas` learns how much each adapter counts."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.strategies.merging.methods.atlas import Atlas
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["learned_on_rows"]

_STEPS, _RATE = 50, 0.05


def learned_on_rows(
    folders: Sequence["PeftFolder"], run: Path | None, source: str | None, steps: int | None, rate: float | None
) -> "tuple[Atlas, dict[str, Any]]":
    """The method with coefficients learned on rows of this machine, and what is to be said of it.

    Args:
        folders: The adapters.
        run: The run file that they were trained with.
        source: A file, a folder or a packaged data set; of the latter two the split "test" is taken.
        steps: Of Adam, at least 1; None for 50.
        rate: Its learning rate, above 0; None for 0.05.

    Raises:
        ConfigError: There is no run file or no rows, an option is out of range, or the adapters do not belong together.
        ModelError: An adapter is not of the run file's base model, task and labels, or the loss is not finite.
    """
    from fedloom.strategies.merging.adapter import FinishedAdapter, weighted_sum
    from fedloom.strategies.merging.merge_folders import merge_folders
    from fedloom.strategies.merging.methods.api import places
    from fedloom.strategies.merging.methods.atlas import Atlas
    from fedloom.strategies.merging.methods.soup import Soup
    from fedloom.strategies.merging.peft_folder import write_folder

    if run is None or source is None:
        raise ConfigError(
            "atlas learns how much each adapter counts; give the run file that they were trained with as --run and "
            "rows that are not private as --rows"
        )
    steps, rate = _STEPS if steps is None else steps, _RATE if rate is None else rate
    if steps < 1 or not 0 < rate < float("inf"):
        raise ConfigError(f"steps is {steps} and learning_rate {rate:g}; at least one step at a rate above 0 is needed")
    config, adapters = load_run(run), [each.adapter for each in folders]
    whole = merge_folders(folders, Soup()).adapter.whole  # which refuses what does not belong together
    try:
        from fedloom.client.eval.held_out import HeldOut
        from fedloom.client.training.coefficients import learn_coefficients
    except ModuleNotFoundError as error:
        raise ConfigError(f"learning needs {error.name!r}, which is not installed; install fedloom[client]") from error
    held_out = HeldOut.load(config, source, "train" if Path(source).is_file() else "test")
    ranks = {module: [each.products[module].rank for each in adapters] for module in places(adapters[0].products)}
    if not ranks:
        raise ConfigError(
            f"{folders[0].path} has no low-rank pair, and atlas learns nothing else; take the method soup"
        )
    most = max(map(sum, ranks.values()))
    stacked = {
        module: weighted_sum([each.products[module] for each in adapters], [1.0] * len(adapters)).padded(most)
        for module in ranks
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "stacked"
        write_folder(folder, FinishedAdapter(stacked, whole), folders[0], folders[0].facts, len(folders))
        learned = learn_coefficients(held_out.exported(folder), held_out.rows, ranks, steps, rate)
    method = Atlas(tuple(learned.coefficients[module] for module in ranks))
    return method, {
        "options": {"steps": steps, "learning_rate": rate},
        "coefficients": {module: list(each) for module, each in learned.coefficients.items()},
        "rows": {
            "source": source,
            "examples": len(held_out.rows),
            "loss_before": learned.before,
            "loss": learned.after,
        },
    }
