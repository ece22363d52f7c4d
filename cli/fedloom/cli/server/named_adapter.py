"""An adapter as it is named to a command: its folder, the run folder that it is in, or RUN@ROUND."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.core.config.run import RunConfig, load_run
from fedloom.core.errors import ConfigError
from fedloom.strategies.merging.peft_folder import PeftFolder, read_folder

if TYPE_CHECKING:
    from fedloom.server.storage.kept import KeptRound

__all__ = ["named_adapter"]

_ROUND = re.compile(r"(.+)@(\d+)")


def named_adapter(name: Path) -> PeftFolder:
    """Read a PEFT adapter.

    Args:
        name: The folder of one; a run folder with one in `adapter`, or that of a run which goes on and keeps rounds; or
            RUN@ROUND: the adapter after a round, from the run's `checkpoints` or from what rounds.keep has kept, which
            needs the base model.

    Raises:
        ConfigError: It is none that can be read, see `read_folder`, or the round is not there.
        ModelError: The base model cannot be loaded.
    """
    if (found := _ROUND.fullmatch(str(name))) and not name.exists():
        return _of_round(Path(found[1]), int(found[2]))
    inside = name / "adapter"
    if (inside / "adapter_config.json").is_file():
        return replace(read_folder(inside), run=str(name.resolve()))
    kept = list(_kept(name)) if not (name / "merged").is_dir() else []
    return _exported(*kept[-1], name) if kept else read_folder(name)


def _of_round(run: Path, number: int) -> PeftFolder:
    checkpoint = run / "checkpoints" / f"round-{number}"
    if (checkpoint / "adapter_config.json").is_file():
        return _called(read_folder(checkpoint), run, number)
    there: list[int] = []
    for kept, config in _kept(run):
        if kept.number == number:
            return _exported(kept, config, run)
        there.append(kept.number)
    has = f"it has {', '.join(map(str, there))}" if there else "it has none"
    raise ConfigError(
        f"{run} has not kept round {number} ({has}); set rounds.keep in the run file, or fl.Checkpoint in Python, "
        "before the run"
    )


def _kept(run: Path) -> "Iterator[tuple[KeptRound, RunConfig]]":
    if (run / "run.toml").is_file() and (run / "state" / "run.db").is_file():
        from fedloom.server.storage.kept import kept_rounds

        config = load_run(run / "run.toml")
        for kept in kept_rounds(run / "state", config):
            yield kept, config


def _exported(kept: "KeptRound", config: RunConfig, run: Path) -> PeftFolder:
    """A kept state as a user gets it, by way of a folder that is gone afterwards."""
    from fedloom.client.models.exports.facts import facts
    from fedloom.client.models.exports.peft_adapter import save_adapter
    from fedloom.client.models.load import load_model
    from fedloom.core.privacy.spends import run_statement

    model = load_model(config.model, config.adapter)
    model.show(kept.strategy.result(kept.after))
    privacy = run_statement(config, kept.number) if config.privacy.enabled else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(model, folder, {**facts(config, privacy), "rounds": kept.number})
        return _called(read_folder(folder), run, kept.number)


def _called(adapter: PeftFolder, run: Path, number: int) -> PeftFolder:
    facts = {**adapter.facts, "run": f"{adapter.facts.get('run', run.name)}@{number}"}
    return replace(adapter, path=Path(f"{run}@{number}"), facts=facts, run=str(run.resolve()))
