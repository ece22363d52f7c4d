"""Files that survive a crash whole: either the old content is there or the new, never a part."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom.core.runtime.failpoints import failpoint, reach

__all__ = ["make_folder", "replacing_folder", "sync_folder", "write_durably"]


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it; their names are on disk on return.

    A file that is synced in a folder whose own name is not on disk is lost with it in a power cut.

    Raises:
        OSError: The disk refuses.
    """
    made = [each for each in folder.parents if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # Its own name also when it is there already: whoever made it may have been killed before syncing it.
    for each in (folder, *made):
        sync_folder(each.parent)


@failpoint("durable.write")
def write_durably(path: Path, *parts: bytes) -> None:
    """Replace `path` by the concatenation of `parts`; on disk, under its name, on return.

    The order is write, fsync, rename, fsync of the folder: without the first fsync the name may come back
    after a power cut with nothing behind it, without the second the name itself may be missing.

    Raises:
        OSError: The disk refuses; `path` then has its old content or the new one, and which is unknown.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        for part in parts:
            file.write(part)
        reach("durable.written")
        file.flush()
        os.fsync(file.fileno())
    reach("durable.synced")
    os.replace(temporary, path)
    reach("durable.renamed")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: syncing a file does not sync the folder it was created in."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder`, on disk, when the block ends without an error.

    Two folders cannot be swapped in one step. A process that dies between the two renames leaves no `folder`, but the
    old one beside it as .NAME.fedloom-old; the next call puts that back before it begins, and removes what else a dead
    one has left.

    Args:
        folder: An absolute path that is no link; need not exist.

    Raises:
        OSError: The disk refuses, or `folder` is a file, or where a file system is mounted.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder.name} is no folder")
    make_folder(folder.parent)
    draft, old = (folder.with_name(f".{folder.name}.fedloom-{kind}") for kind in ("new", "old"))
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for left in (draft, old):
        if left.exists():
            shutil.rmtree(left)
    draft.mkdir()
    try:
        yield draft
        for each in (*draft.rglob("*"), draft):
            sync_folder(each)  # files as well: what counts is that it is open
        if folder.exists():
            os.rename(folder, old)
        os.rename(draft, folder)
    except Exception:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)
