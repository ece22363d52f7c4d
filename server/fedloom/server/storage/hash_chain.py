"""Hash chains over logs: every record vouches for all before it.

The link of a record is SHA-256 over the link before and the record's text; the first follows from the log's name. A
record that is changed, moved, taken out or put in breaks the chain there. What is cut off at the end is missed by a
mark: number and link of the newest record, kept beside the database. Whoever can write the files can also make a
whole new chain; what stands against that is a link that was noted elsewhere, which the log must still contain.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fedloom.core.errors import StoreError

__all__ = ["Mark", "beginning", "follow", "link", "mark_to_bytes", "read_mark"]

Mark = tuple[int, str]
"""Number of the newest record, 0 for none, and its link."""

_MARK_BYTES = 512
"""One sector, which disks write whole or not at all."""


def beginning(log: str) -> str:
    """The link before the first record of the log with this name, hex."""
    return hashlib.sha256(f"fedloom {log} 1".encode()).hexdigest()


def link(before: str, record: str) -> str:
    """The link of a record, hex, from the link before it."""
    return hashlib.sha256(f"{before}\n{record}".encode()).hexdigest()


def follow(where: str, log: str, rows: Iterable[tuple[int, str, str]], mark: Mark) -> Iterator[tuple[str, str]]:
    """The records and their links, oldest first, each checked as it comes.

    Args:
        where: File or database, for the error.
        log: Name of the log, such as "events".
        rows: Number from 1, text and stored link of each record, in the order of the numbers.
        mark: What was the newest record at some time before.

    Raises:
        StoreError: A record is missing or is not the one that was written; the first such one is named.
    """
    before, count = beginning(log), 0
    for number, record, stored in rows:
        count += 1
        if number != count:
            raise _broken(where, log, count, f"is missing, the next one is {number}")
        before = link(before, record)
        if before != stored:
            raise _broken(where, log, number, f"is not the one that was written: {record[:80]!r}")
        if number == mark[0] and stored != mark[1]:
            raise _broken(where, log, number, "is not the one that the mark beside it names")
        yield record, stored
    if count < mark[0]:
        raise _broken(where, log, count + 1, f"to {mark[0]} are missing")


def mark_to_bytes(marks: Mapping[str, Mark]) -> bytes:
    """The marks of several logs, always of the same length."""
    return json.dumps(marks).encode().ljust(_MARK_BYTES - 1) + b"\n"


def read_mark(path: Path) -> dict[str, Mark]:
    """Read what `mark_to_bytes` wrote to a file.

    Raises:
        StoreError: It is missing or something else.
    """
    try:
        content = path.read_bytes()
        marks = {str(log): (int(number), str(text)) for log, (number, text) in json.loads(content).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}; restore the state directory from a backup") from error
    if mark_to_bytes(marks) != content:
        raise StoreError(f"{path} is damaged; restore the state directory from a backup")
    return marks


def _broken(where: str, log: str, number: int, what: str) -> StoreError:
    return StoreError(f"{where}: record {number} of the log of {log} {what}; restore the state directory from a backup")
