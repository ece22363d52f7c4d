"""A folder that somebody named for a result: replaced whole, and never with anything else in it."""

from collections.abc import Callable
from pathlib import Path

from fedloom.core.errors import ConfigError
from fedloom.core.runtime.durable import replacing_folder

__all__ = ["replace_export"]


def replace_export(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that then takes the place of `folder`, see `durable.replacing_folder`.

    Args:
        folder: Need not exist; a link stays a link.
        write: Writes all files into the folder that it gets.

    Raises:
        ConfigError: The folder holds files that `write` does not, is the one this process runs in, or cannot be
            written.
    """
    target = folder.resolve()
    if Path.cwd().is_relative_to(target):
        raise ConfigError(f"{target} is where this runs, and an export's folder is replaced whole; give one inside it")
    try:
        with replacing_folder(target) as draft:
            write(draft)
            if others := _names(target) - _names(draft):
                raise ConfigError(
                    f"{target} holds {', '.join(sorted(others)[:3])}, which is no part of an export, and would be "
                    "replaced whole; give another folder, or move that away"
                )
    except OSError as error:
        raise ConfigError(f"cannot export to {target}: {error}; free the disk or give another folder") from error


def _names(folder: Path) -> set[str]:
    """Of what is in a folder, if there is one."""
    return {each.name for each in folder.iterdir()} if folder.is_dir() else set()
