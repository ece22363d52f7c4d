"""What is known of a ledger outside its file, so that an older or other file in its place is noticed.

An anchor is a small file, best kept on another path than the ledger (`default_anchors`). It holds how many entries
the ledger has, the hash of the last one, the steps charged so far, and where the ledger lies. It is written after
each entry of the ledger and before anything is done on the strength of that entry. A crash between the two writes
leaves it one entry behind, never ahead.

One machine cannot tell everything. If the ledger and its anchor are put back together, as a snapshot of a whole
virtual machine does, or a copy of the disk runs on a second machine with the first one's identity, nothing here
differs from the truth. Whoever may write both files can also forge both: the hashes have no key.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedloom.client.privacy.ledger.hash_chain import Entry, unlinked
from fedloom.core.errors import LedgerError
from fedloom.core.runtime.durable import write_durably
from fedloom.core.runtime.failpoints import failpoint

__all__ = ["Anchor", "Place", "anchor_path", "anchors_at", "default_anchors", "place_of", "read_anchor", "troubles"]

_MACHINE_ID = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


@dataclass(frozen=True)
class Place:
    """Where a ledger lies, as far as a copy of it lies elsewhere.

    Args:
        folder: Its folder, absolute, without symbolic links.
        inode: Of the file; a file that was copied back has another one.
        machine: Digest of the machine's id; "" where the system has none.
    """

    folder: str
    inode: int
    machine: str


@dataclass(frozen=True)
class Anchor:
    """What is known of a ledger.

    Args:
        account: The account's id.
        name: The account's name, which is the ledger's file name without its ending.
        place: Where the ledger lies.
        sequence: Number of its last entry.
        head: Hash of its last entry.
        steps: Steps charged by (sampling rate, noise multiplier).
    """

    account: str
    name: str
    place: Place
    sequence: int
    head: str
    steps: Counter[tuple[float, float]]

    @failpoint("anchor.write")
    def write(self, anchors: Path) -> None:
        """Put it in the place of the one before; durable on return.

        Raises:
            OSError: The disk refuses.
        """
        content = asdict(self) | {"steps": [[rate, noise, count] for (rate, noise), count in self.steps.items()]}
        text = json.dumps(content, sort_keys=True).encode()
        write_durably(anchor_path(anchors, self.account), text, b"\n", hashlib.sha256(text).hexdigest().encode())


def default_anchors() -> Path:
    """Where anchors lie unless the policy says otherwise: XDG's folder for a user's state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "fedloom"


def anchor_path(anchors: Path, account: str) -> Path:
    """The anchor file of the account with this id."""
    return anchors / f"{account}.anchor"


def place_of(ledger: Path) -> Place:
    """Where the ledger file lies now.

    Raises:
        OSError: It does not exist.
    """
    machine = next((path.read_text().strip() for path in _MACHINE_ID if path.is_file()), "")
    known = hashlib.sha256(f"fedloom machine {machine}".encode()).hexdigest()[:16] if machine else ""
    return Place(str(ledger.parent.resolve()), ledger.stat().st_ino, known)


def read_anchor(path: Path) -> Anchor | None:
    """The anchor in this file; None when there is no such file.

    Raises:
        LedgerError: It is damaged.
    """
    try:
        text, _, digest = path.read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("its digest does not fit")
        content = json.loads(text)
        steps = Counter({(rate, noise): count for rate, noise, count in content.pop("steps")})
        return Anchor(**content | {"place": Place(**content["place"]), "steps": steps})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(
            f"anchor {path} is damaged ({error}); restore it from a backup that is not older than the last run, or "
            "move it away and run `fedloom ledger recover`"
        ) from error


def anchors_at(anchors: Path, folder: Path) -> list[Anchor]:
    """Anchors of ledgers that lie, or lay, in `folder`.

    Raises:
        LedgerError: An anchor is damaged; whose it was cannot be known.
    """
    place = str(folder.resolve())
    found = [read_anchor(path) for path in sorted(anchors.glob("*.anchor"))]
    return [anchor for anchor in found if anchor is not None and anchor.place.folder == place]


def troubles(entries: Sequence[Entry], anchor: Anchor | None, place: Place) -> list[str]:
    """Why a ledger cannot be trusted to be the newest state of its account; empty when nothing is wrong.

    Args:
        entries: All of the ledger's entries; at least one.
        anchor: Its anchor; None if there is none, as after a crash during the very first write.
        place: Where the ledger lies now.
    """
    wrong = unlinked(entries)
    if wrong is not None:
        return [f"entry {wrong} is not the one that was written: it was edited, or entries before it are missing"]
    if anchor is None:
        return ["its anchor is missing"] if len(entries) > 1 else []
    return _history(entries, anchor) + _elsewhere(anchor.place, place)


def _history(entries: Sequence[Entry], anchor: Anchor) -> list[str]:
    count = len(entries)
    if count < anchor.sequence:
        return [
            f"it ends with entry {count}, but its anchor knows entry {anchor.sequence}: an older copy was put in its "
            "place, or its end was cut off"
        ]
    if count > anchor.sequence + 1:
        return [f"it has {count} entries, but its anchor knows only {anchor.sequence}: the anchor is an older copy"]
    if entries[anchor.sequence - 1].hash != anchor.head:
        return [f"entry {anchor.sequence} is not the one its anchor knows: its history was rewritten"]
    return []


def _elsewhere(known: Place, found: Place) -> list[str]:
    if known.machine != found.machine:
        return ["it was kept on another machine: it is a copy or was moved"]
    if known.folder != found.folder:
        return [f"it was kept in {known.folder}: it is a copy or was moved"]
    if known.inode != found.inode:
        return ["its file is another one than was written: a copy was put in its place"]
    return []
