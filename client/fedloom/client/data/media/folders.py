"""Folders of files, one for each class: the kinds of files that are read so, and their rows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.client.data.files import Note, Row, readable
from fedloom.client.data.media import audio, images
from fedloom.client.tasks.api import Traits
from fedloom.core.config.file_format import Column
from fedloom.core.errors import DataError

__all__ = ["HIDDEN", "Kind", "folder_rows", "kind_of"]

HIDDEN = Note("a hidden file or folder, passed over")


class Kind(NamedTuple):
    """What the files of a task are."""

    column: Column
    """The column of a row that has one."""
    name: str
    """Of one of them, in words."""
    suffixes: tuple[str, ...]
    """Ends of their names, in small letters."""
    formats: tuple[str, ...]
    """What can be read, for errors."""


_PICTURES = Kind("image", "picture", images.SUFFIXES, images.FORMATS)
_RECORDINGS = Kind("audio", "recording", audio.SUFFIXES, audio.FORMATS)


def kind_of(traits: Traits) -> Kind | None:
    """What the files of a task's rows are; None where rows are texts."""
    return _PICTURES if traits.images else _RECORDINGS if traits.audio else None


def folder_rows(folder: Path, kind: Kind, column: str, label: str) -> Iterator[Row]:
    """A row for each file in the folders below `folder`, whose names are the labels, and a note on all else.

    Args:
        folder: CLASS/FILE below it, also deeper. Links to folders are not followed.
        kind: What the files are.
        column: Name of the row's column for a file's bytes.
        label: Name of its column for the class.
    """
    with readable(folder):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name.startswith("."):
            yield str(entry), HIDDEN
        elif entry.is_dir():
            for path in _below(entry):
                yield str(path), _row(path, entry, kind, column, label)
        elif entry.suffix.lower() in kind.suffixes:
            stray = Note(f"a {kind.name} outside the folders of the classes", "put it into the folder of its class")
            yield str(entry), stray
        else:
            yield str(entry), Note("a file beside the folders of the classes, passed over")


def _below(folder: Path) -> list[Path]:
    """All files and links in a folder and those below it."""

    def stop(error: OSError) -> None:
        raise error

    with readable(folder):
        found = [
            Path(place, name)
            for place, folders, files in os.walk(folder, onerror=stop)
            for name in (*files, *(name for name in folders if os.path.islink(os.path.join(place, name))))
        ]
    return sorted(found)


def _row(path: Path, group: Path, kind: Kind, column: str, label: str) -> dict[str, Any] | DataError | Note:
    if any(part.startswith(".") for part in path.relative_to(group).parts):
        return HIDDEN
    if path.is_dir():
        return Note("a link to a folder, not followed", f"put the {kind.name}s themselves there")
    if path.suffix.lower() not in kind.suffixes:
        other = f"a file that ends in {path.suffix}" if path.suffix else "a file whose name has no end"
        remedy = f"if it is a {kind.name}, write it as one of {', '.join(kind.formats)}"
        return Note(f"{other}, passed over", remedy)
    try:
        return {column: path.read_bytes(), label: group.name}
    except OSError as error:
        return DataError(f"{path} cannot be read: {error.strerror}; check its permissions")
