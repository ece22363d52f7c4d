"""The scores by which `fedloom merge --method greedy-soup` chooses."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.core.config.run import load_run
from fedloom.core.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.strategies.merging.greedy_soup import GreedySoup
    from fedloom.strategies.merging.merge import Rank
    from fedloom.strategies.merging.peft_folder import PeftFolder

__all__ = ["chosen_by_score"]


def chosen_by_score(
    folders: Sequence["PeftFolder"], rank: "Rank | None", run: Path | None, source: str | None
) -> "GreedySoup":
    """Which adapters a greedy soup has, by their accuracy on held-out rows of this machine.

    Args:
        folders: The adapters.
        rank: Of the soup, as it will be written.
        run: The run file that they were trained with.
        source: A file, a folder or a packaged data set; None for that of the run file.

    Raises:
        ConfigError: There is no run file or data set, or the adapters do not belong together.
        ModelError: An adapter is not of the run file's base model, task and labels.
    """
    from fedloom.strategies.merging.greedy_soup import greedy_soup
    from fedloom.strategies.merging.merge_folders import check_together, merge_folders
    from fedloom.strategies.merging.methods.soup import Soup
    from fedloom.strategies.merging.peft_folder import write_folder

    if run is None:
        raise ConfigError("greedy-soup scores adapters; give the run file that they were trained with as --run")
    config = load_run(run)
    rows = source or (config.data.source if config.data else None)
    if rows is None:
        raise ConfigError(f"{run} has no [data] section; name a file, a folder or a packaged data set with --score-on")
    check_together(folders)
    try:
        from fedloom.client.eval.held_out import HeldOut
    except ModuleNotFoundError as error:
        raise ConfigError(f"scoring needs {error.name!r}, which is not installed; install fedloom[client]") from error
    held_out = HeldOut.load(config, rows, "train" if Path(rows).is_file() else "test")

    def score(chosen: tuple[int, ...]) -> float:
        parts = [folders[index] for index in chosen]
        if len(parts) == 1 and rank is None and parts[0].path.is_dir():
            return held_out.score_exported(parts[0].path).accuracy
        with tempfile.TemporaryDirectory() as scratch:
            soup = Path(scratch) / "soup"
            write_folder(soup, merge_folders(parts, Soup(), rank=rank).adapter, parts[0], parts[0].facts, len(parts))
            return held_out.score_exported(soup).accuracy

    return greedy_soup(len(folders), score)
